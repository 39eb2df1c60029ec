"""``--dry-run``: everything that can be known before hours of work, and a look at what the model will see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkkv.recipes.config import GrpoStage, Recipe, RejectionSamplingStage, ScpoStage, SftStage
from thinkkv.recipes.evaluation import importance_settings, split_response, step_weights
from thinkkv.recipes.problems import Problems, load_problems
from thinkkv.recipes.responses import sample
from thinkkv.recipes.rewards import build_reward
from thinkkv.recipes.trainer_arguments import check_arguments, rl_arguments, sft_arguments
from thinkkv.recipes.weights import Weights, load_tokenizer, open_model

SHOWN = 2
"""Responses that are split and shown."""


@dataclass(frozen=True)
class Shown:
    """A response split into steps.

    Args:
        prompt: as the model sees it.
        steps: text and weight of each.
        answer: what follows.
    """

    prompt: str
    steps: tuple[tuple[str, float], ...]
    answer: str


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Args:
        prompts: how many, and tokens of the longest.
        stages: kind, and most tokens that it samples and trains on.
        bytes: memory estimate by part.
        shown: a few responses.
    """

    prompts: tuple[int, int]
    stages: tuple[tuple[str, int, int], ...]
    bytes: dict[str, int]
    shown: tuple[Shown, ...]


def plan(recipe: Recipe) -> Plan:
    """Check all that can be checked, and load the model once; nothing is written."""
    for reward in recipe.reward:
        build_reward(reward, recipe.steps)
    tokenizer = load_tokenizer(recipe)
    problems = load_problems(recipe.data, tokenizer, recipe.seed)
    check_arguments(recipe, problems)
    longest = max(len(tokenizer(row["prompt"]).input_ids) for row in problems.train[:1000])
    stages = tuple(_budget(recipe, index, len(problems.train)) for index in range(len(recipe.stages)))
    model = open_model(recipe, Weights(), trainable=True)
    return Plan(
        (len(problems.train), longest),
        stages,
        _memory(recipe, model, longest),
        _shown(recipe, model.eval(), tokenizer, problems),
    )


def _budget(recipe: Recipe, index: int, prompts: int) -> tuple[str, int, int]:
    """Kind of a stage, and upper bounds of the tokens it samples and trains on."""
    stage, longest = recipe.stages[index], recipe.rollout.max_new_tokens
    if isinstance(stage, RejectionSamplingStage):
        return stage.kind, min(stage.prompts or prompts, prompts) * stage.samples * longest, 0
    if isinstance(stage, SftStage):
        arguments = sft_arguments(recipe, index, Path("unused"))
        batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        steps = (
            arguments.max_steps if arguments.max_steps > 0 else math.ceil(prompts * arguments.num_train_epochs / batch)
        )
        return stage.kind, 0, steps * batch * (arguments.max_length or longest)
    arguments = rl_arguments(recipe, index, Path("unused"))
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    steps = arguments.max_steps
    if steps <= 0:
        updates = prompts * arguments.num_generations * arguments.num_iterations
        steps = math.ceil(updates * arguments.num_train_epochs / batch)
    trained = steps * batch * arguments.max_completion_length
    return stage.kind, trained // arguments.num_iterations, trained


def _memory(recipe: Recipe, model: Any, longest: int) -> dict[str, int]:
    """Bytes of weights, gradients with optimizer state, the sampler's cache, and the logits of one update."""
    parameters = list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = parameters[0].element_size()
    tokens = longest + recipe.rollout.max_new_tokens
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * head * width
    rl = [
        rl_arguments(recipe, index, Path("unused"))
        for index, stage in enumerate(recipe.stages)
        if isinstance(stage, (ScpoStage, GrpoStage))
    ]
    update = max((arguments.per_device_train_batch_size for arguments in rl), default=1)
    rollouts = max(
        (arguments.per_device_train_batch_size * arguments.steps_per_generation for arguments in rl),
        default=recipe.rollout.batch_size,
    )
    return {
        "weights": weights,
        "gradients and optimizer": trained * 12,
        "rollout cache": rollouts * tokens * row,
        "logits of one update": update * tokens * config.vocab_size * 4,
    }


def _shown(recipe: Recipe, model: Any, tokenizer: Any, problems: Problems) -> tuple[Shown, ...]:
    """Traces of the data where it has some, else samples of the model."""
    rows = problems.train[:SHOWN]
    if all(isinstance(row.get("completion"), str) for row in rows):
        ids = [tokenizer(row["completion"], add_special_tokens=False).input_ids for row in rows]
    else:
        ids = sample(model, tokenizer, [row["prompt"] for row in rows], recipe.rollout, seed=recipe.seed)
    splits = [split_response(tokenizer, row["prompt"], part, recipe) for row, part in zip(rows, ids, strict=True)]
    items = [(row["prompt"], part, split) for row, part, split in zip(rows, ids, splits, strict=True)]
    weights = step_weights(model, tokenizer, items, importance_settings(recipe))
    return tuple(
        Shown(
            prompt,
            tuple((tokenizer.decode(part[a:b]), value) for (a, b), value in zip(split.spans, row, strict=True)),
            tokenizer.decode(part[split.answer_start :]),
        )
        for (prompt, part, split), row in zip(items, weights, strict=True)
    )
