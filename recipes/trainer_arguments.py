"""TRL's argument objects from a stage's ``args``: their names unchanged, our defaults where the recipe is silent."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkkv.patches.errors import RecipeError
from thinkkv.recipes.config import GrpoStage, Recipe, ScpoStage, SftStage
from thinkkv.recipes.weights import lora_config

if TYPE_CHECKING:
    from thinkkv.recipes.smartthinker.scpo import SCPO


def sft_arguments(recipe: Recipe, index: int, folder: Path) -> Any:
    """SFTConfig of a stage; ``max_length`` is unlimited unless the recipe says otherwise."""
    from trl import SFTConfig

    stage = recipe.stages[index]
    assert isinstance(stage, SftStage)
    defaults = {"max_length": None, "completion_only_loss": True}
    return _arguments(SFTConfig, recipe, index, folder, defaults)


def rl_arguments(recipe: Recipe, index: int, folder: Path) -> Any:
    """GRPOConfig of a stage."""
    from trl import GRPOConfig

    stage = recipe.stages[index]
    assert isinstance(stage, (ScpoStage, GrpoStage))
    defaults = {
        "num_generations": 8,
        "num_iterations": 2,
        "max_completion_length": recipe.rollout.max_new_tokens,
        "temperature": recipe.rollout.temperature,
        "learning_rate": 1e-5 if recipe.lora is not None else 1e-6,
        "beta": 0.0,
        "reward_weights": [reward.weight for reward in recipe.reward],
    }
    found = _arguments(GRPOConfig, recipe, index, folder, defaults)
    if found.use_vllm and recipe.rollout.policy != "full":
        raise RecipeError(
            f"stages.{index}: vLLM samples with its own cache - set rollout.policy to full, or drop use_vllm"
        )
    return found


def scpo_settings(stage: ScpoStage, seed: int) -> SCPO:
    """The trainer's settings of a stage."""
    from thinkkv.recipes.smartthinker.scpo import SCPO

    return SCPO(seed=seed, **{key: value for key, value in vars(stage).items() if key not in ("kind", "args")})


def check_arguments(recipe: Recipe, *, knows_importance: bool) -> None:
    """Make every stage's arguments once, so that a mistake in the last stage shows before the first one runs.

    Args:
        recipe: the recipe.
        knows_importance: whether its task has an oracle.

    Raises:
        RecipeError: one of them makes no sense.
    """
    from thinkkv.recipes.smartthinker.scpo import check

    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, SftStage):
            sft_arguments(recipe, index, Path("unused"))
        if isinstance(stage, (ScpoStage, GrpoStage)):
            arguments = rl_arguments(recipe, index, Path("unused"))
            if isinstance(stage, ScpoStage):
                check(arguments, scpo_settings(stage, recipe.seed), knows_importance=knows_importance)
    lora_config(recipe.lora or {})


def _arguments(kind: Any, recipe: Recipe, index: int, folder: Path, defaults: dict[str, Any]) -> Any:
    import torch

    stage = recipe.stages[index]
    given = dict(getattr(stage, "args", {}))
    known = {item.name for item in dataclasses.fields(kind) if item.init}
    owned = {"output_dir", "seed", "report_to"} & set(given)
    if owned:
        raise RecipeError(f"stages.{index}.args.{min(owned)} is set by the recipe - use output, or seed")
    if unknown := sorted(set(given) - known):
        close = difflib.get_close_matches(unknown[0], known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"see TRL's {kind.__name__}"
        raise RecipeError(f"stages.{index}.args has an unknown key {unknown[0]} - {advice}")
    cuda = torch.cuda.is_available()
    ours = {
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 2,
        "bf16": cuda and torch.cuda.is_bf16_supported(),
        "use_cpu": not cuda,
        "disable_tqdm": True,
        "report_to": list(recipe.output.report_to) or "none",
        "output_dir": str(folder),
        "seed": recipe.seed,
    }
    try:
        return kind(**{**ours, **defaults, **given})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"stages.{index}.args: {' '.join(str(error).split())} - see TRL's {kind.__name__}") from None
