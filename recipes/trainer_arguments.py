"""TRL's argument objects from a stage's ``args``: their names unchanged, our defaults where the recipe is silent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkkv.patches.errors import RecipeError
from thinkkv.recipes.config import GrpoStage, Recipe, ScpoStage, SftStage
from thinkkv.recipes.problems import Problems
from thinkkv.recipes.strict_yaml import check_options
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
        raise recipe.document.error(
            ("stages", index, "args", "use_vllm"),
            f"stages.{index}: vLLM samples with its own cache - set rollout.policy to full, or drop use_vllm",
        )
    return found


def scpo_settings(stage: ScpoStage, seed: int) -> SCPO:
    """The trainer's settings of a stage."""
    from thinkkv.recipes.smartthinker.scpo import SCPO

    return SCPO(seed=seed, **{key: value for key, value in vars(stage).items() if key not in ("kind", "args")})


def check_arguments(recipe: Recipe, problems: Problems) -> None:
    """Make every stage's arguments once, so that a mistake in the last stage shows before the first one runs.

    Args:
        recipe: the recipe.
        problems: its own.

    Raises:
        RecipeError: one of them makes no sense, or asks for what the problems do not have.
    """
    from thinkkv.recipes.smartthinker.scpo import check

    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, SftStage):
            sft_arguments(recipe, index, Path("unused"))
            if recipe.trains_on_traces(index):
                _check_traces(recipe, index, problems)
        if isinstance(stage, (ScpoStage, GrpoStage)):
            arguments = rl_arguments(recipe, index, Path("unused"))
            if isinstance(stage, ScpoStage):
                try:
                    check(arguments, scpo_settings(stage, recipe.seed), knows_importance=problems.weigh is not None)
                except RecipeError as error:
                    raise recipe.document.error(("stages", index), f"stages.{index}: {error}") from None
    lora_config(recipe)
    _check_trackers(recipe)


def _check_trackers(recipe: Recipe) -> None:
    """Make each tracker's callback once, as the trainer will."""
    from transformers.integrations import get_reporting_integration_callbacks

    for name in recipe.output.report_to:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError) as error:
            problem = f"output.report_to: {str(error).rstrip('.')} - install {name}, or name another tracker"
            raise recipe.document.error(("output", "report_to"), problem) from None


def _check_traces(recipe: Recipe, index: int, problems: Problems) -> None:
    bare = sum(not isinstance(row.get("completion"), str) for row in problems.train)
    if bare:
        raise recipe.document.error(
            ("stages", index),
            f"stages.{index} trains on traces and {bare} of {len(problems.train)} rows of {recipe.data.source} have "
            "no completion - map it with data.columns, or put a rejection_sampling stage before",
        )


def _arguments(kind: Any, recipe: Recipe, index: int, folder: Path, defaults: dict[str, Any]) -> Any:
    import torch

    stage = recipe.stages[index]
    given = dict(getattr(stage, "args", {}))
    place = ("stages", index, "args")
    for key in given:
        if key in ("output_dir", "seed", "report_to"):
            problem = f"stages.{index}.args.{key} is set by the recipe - use output, or seed"
            raise recipe.document.error((*place, key), problem)
    check_options(recipe.document, place, given, kind, "TRL")
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
        problem = f"stages.{index}.args: {' '.join(str(error).split())} - see TRL's {kind.__name__}"
        raise recipe.document.error(place, problem) from None
