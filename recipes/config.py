"""What a recipe says: its keys, their meaning and their defaults.

TRL's and PEFT's own options keep their names, in the pass-through blocks ``args`` and ``lora``; everything else is
here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from thinkkv.patches.errors import RecipeError
from thinkkv.recipes.smartthinker.clipping import ClipRange
from thinkkv.recipes.smartthinker.reward import StepReward
from thinkkv.recipes.smartthinker.steps import StepRules
from thinkkv.recipes.strict_yaml import Document, build, read, unknown_key

FORMAT = 1
"""Of what a finished stage leaves for the next run; raised when it changes, so that older stages are done again."""


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained.

    Args:
        name: alias, hub id, checkpoint folder or GGUF file.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default the checkpoint's.
        scratch: instead of a name: fields of a ``LlamaConfig``, for a random model with the task's tokenizer.
    """

    name: str | None = None
    dtype: str | None = None
    scratch: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.scratch is None):
            raise ValueError("give either name or scratch")


@dataclass(frozen=True)
class DataConfig:
    """Problems, and perhaps traces.

    Args:
        source: ``task:running-value``, ``gym:<dataset>[,<dataset>...]``, a jsonl or parquet file, or a hub data set.
        split: of a hub data set.
        columns: our name to theirs, for ``prompt``, ``answer`` and ``completion``.
        system: system message in front of every prompt.
        template: the prompt's text around ``{prompt}``.
        rows: how many to train on, held-out problems that come up again not counted out; None: all, where the source
            ends.
        eval_rows: how many are kept apart for the evaluation, never trained on.
        options: of the generated source.
    """

    source: str
    split: str = "train"
    columns: Mapping[Literal["prompt", "answer", "completion"], str] = field(default_factory=dict)
    system: str | None = None
    template: str = "{prompt}"
    rows: int | None = None
    eval_rows: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardConfig:
    """One reward; the first one of a recipe says what is right.

    Args:
        name: ``exact``, ``math_verify``, ``format``, ``gym``, or a dotted path to a function with TRL's signature.
        weight: in the sum.
    """

    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled, in every stage and in the evaluation's shape.

    Args:
        policy: cache policy of the sampler; ``full`` is plain generation.
        ratio: share of the prompt's cache for other policies.
        max_new_tokens: longest response.
        temperature: of sampling, also of the loss.
        batch_size: responses at a time outside TRL.
    """

    policy: str = "full"
    ratio: float = 0.4
    max_new_tokens: int = 1024
    temperature: float = 1.0
    batch_size: int = 32


@dataclass(frozen=True)
class OutputConfig:
    """What is left behind.

    Args:
        dir: run folder.
        merge: also a merged checkpoint.
        report_to: TRL's trackers: ``tensorboard``, ``wandb``, ``trackio``.
    """

    dir: str | None = None
    merge: bool = False
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class SftStage:
    """Supervised fine-tuning.

    Args:
        kind: ``sft``.
        data: ``traces`` of the data source, or what the last rejection sampling ``sampled``; default: sampled if any.
        tune: the adapter, or the ``full`` model, which becomes the base of later stages.
        args: TRL's SFTConfig.
    """

    kind: Literal["sft"]
    data: Literal["traces", "sampled"] | None = None
    tune: Literal["lora", "full"] = "lora"
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RejectionSamplingStage:
    """Sample, score and keep.

    Args:
        kind: ``rejection_sampling``.
        prompts: how many; None: all.
        samples: responses per prompt.
        keep: the ``shortest`` right ones, or ``random`` ones.
        keep_per_prompt: how many.
    """

    kind: Literal["rejection_sampling"]
    prompts: int | None = None
    samples: int = 8
    keep: Literal["shortest", "random"] = "shortest"
    keep_per_prompt: int = 1


@dataclass(frozen=True)
class ScpoStage:
    """Step-level length control; every key is explained at ``smartthinker.scpo.SCPO``."""

    kind: Literal["scpo"]
    strength: float = 0.5
    importance: Literal["next-steps", "answer-removal", "prefix-gain", "uniform", "random", "oracle"] = "next-steps"
    window: int = 2
    temperature: float = 1.0
    reward: StepReward = field(default_factory=StepReward)
    gamma: float = 1.0
    lam: float = 0.5
    floor: float = 0.1
    whitening: Literal["group", "batch", "none"] = "group"
    step_level: bool = True
    clip: ClipRange = field(default_factory=ClipRange)
    adaptive_clip: bool = True
    max_tokens: int = 4096
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GrpoStage:
    """Plain GRPO, or with the global length penalty of arXiv:2502.04463.

    Args:
        kind: ``grpo``.
        length_penalty: alpha in [0, 1).
        args: TRL's GRPOConfig.
    """

    kind: Literal["grpo"]
    length_penalty: float = 0.0
    args: Mapping[str, Any] = field(default_factory=dict)


Stage = SftStage | RejectionSamplingStage | ScpoStage | GrpoStage

STAGES: Mapping[str, type[Stage]] = {
    "sft": SftStage,
    "rejection_sampling": RejectionSamplingStage,
    "scpo": ScpoStage,
    "grpo": GrpoStage,
}


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Args:
        name: file name without its ending.
        model: what is trained.
        data: on what.
        reward: by which rewards.
        stages: in which order.
        lora: PEFT's LoraConfig; None trains all weights.
        steps: how responses split.
        rollout: how responses are sampled.
        output: what is left behind.
        resume: ``auto`` goes on where a run of the same settings stopped, ``never`` starts over.
        seed: of everything random.
        document: where all this was read, for messages.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    reward: tuple[RewardConfig, ...]
    stages: tuple[Stage, ...]
    lora: Mapping[str, Any] | None = None
    steps: StepRules = field(default_factory=StepRules)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    resume: Literal["auto", "never"] = "auto"
    seed: int = 0
    document: Document = field(default_factory=lambda: Document("recipe", {}), compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Every setting with its value, as plain YAML types."""
        values = dataclasses.asdict(self)
        del values["document"]
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

    def dump(self) -> str:
        """The resolved recipe as YAML; reading it again gives the same recipe."""
        values = self.as_dict()
        del values["name"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def trains_on_traces(self, index: int) -> bool:
        """Whether a stage is fine-tuning on the data's own traces, not on what was sampled before."""
        stage = self.stages[index]
        if not isinstance(stage, SftStage):
            return False
        sampled = any(isinstance(earlier, RejectionSamplingStage) for earlier in self.stages[:index])
        return stage.data == "traces" or (stage.data is None and not sampled)

    def stage_hash(self, index: int) -> str:
        """What decides the result of a stage: everything but where it is written."""
        values = self.as_dict()
        decisive = {key: value for key, value in values.items() if key not in ("name", "output", "resume", "stages")}
        decisive |= {"stages": values["stages"][: index + 1], "format": FORMAT}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def find(name: str) -> Path:
    """A recipe file: the path itself, or the packaged recipe of that name.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("thinkkv.recipes")))
    packaged = folder / f"{path.stem}.yaml"
    if packaged.is_file():
        return packaged
    names = ", ".join(sorted(file.name for file in folder.glob("*.yaml")))
    raise RecipeError(f"{name} does not exist and no packaged recipe bears the name - packaged: {names}")


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Raises:
        RecipeError: anything in it that has no meaning, with its line.
    """
    document = read(path, overrides)
    stages = document.values.get("stages")
    if not isinstance(stages, list) or not stages:
        raise document.error(("stages",), "stages must be a list of at least one stage - add one")
    known = {item.name for item in dataclasses.fields(Recipe)} - {"name", "document"}
    if unknown := [key for key in document.values if key not in known]:
        raise unknown_key(document, (unknown[0],), known)
    rest = build(_Rest, document, {k: v for k, v in document.values.items() if k not in ("stages", "reward")})
    recipe = Recipe(
        name=path.stem,
        stages=tuple(_stage(document, stage, index) for index, stage in enumerate(stages)),
        reward=_rewards(document),
        document=document,
        **{item.name: getattr(rest, item.name) for item in dataclasses.fields(rest)},
    )
    _check_order(document, recipe)
    return recipe


@dataclass(frozen=True)
class _Rest:
    """The keys whose form does not depend on another key."""

    model: ModelConfig
    data: DataConfig
    lora: Mapping[str, Any] | None = None
    steps: StepRules = field(default_factory=StepRules)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    resume: Literal["auto", "never"] = "auto"
    seed: int = 0


def _stage(document: Document, values: Any, index: int) -> Stage:
    kind = values.get("kind") if isinstance(values, Mapping) else None
    if not isinstance(kind, str) or kind not in STAGES:
        raise document.error(
            ("stages", index, "kind"), f"stages.{index}.kind is {kind!r} - choose one of {', '.join(STAGES)}"
        )
    return build(STAGES[kind], document, values, ("stages", index))


def _rewards(document: Document) -> tuple[RewardConfig, ...]:
    """A name, a mapping, or a list of them."""
    given = document.values.get("reward")
    items = given if isinstance(given, list) else [given]
    if not items or items == [None]:
        raise document.error((), "reward is missing - name one: exact, math_verify, format, gym or a dotted path")
    return tuple(
        build(RewardConfig, document, {"name": item} if isinstance(item, str) else item, ("reward", index))
        for index, item in enumerate(items)
    )


def _check_order(document: Document, recipe: Recipe) -> None:
    sampled = False
    for index, stage in enumerate(recipe.stages):
        place = ("stages", index)
        if isinstance(stage, RejectionSamplingStage):
            sampled = True
        if isinstance(stage, SftStage) and stage.data == "sampled" and not sampled:
            raise document.error(place, f"stages.{index} trains on samples - put a rejection_sampling stage before it")
        if isinstance(stage, SftStage) and stage.tune == "full" and index and recipe.lora is not None:
            raise document.error(
                place, f"stages.{index} tunes the full model below an adapter - only the first stage can"
            )
