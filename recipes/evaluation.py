"""What a model does on the held-out problems: accuracy, tokens, and the share of them in critical steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import gather_object

from thinkkv.recipes.config import Recipe, ScpoStage
from thinkkv.recipes.problems import Problems
from thinkkv.recipes.responses import sample, text_of
from thinkkv.recipes.rewards import RIGHT_ABOVE, build_reward, call
from thinkkv.recipes.smartthinker.importance import CRITICAL_FROM, probe, score_naive, score_packed, takes_masks, weight
from thinkkv.recipes.smartthinker.scpo import SCPO
from thinkkv.recipes.smartthinker.steps import Steps, prompt_opens_reasoning, split_steps


@dataclass(frozen=True)
class Response:
    """One response of the evaluation.

    Args:
        prompt: rendered.
        steps: text of each step.
        weights: weight of each step; empty for wrong answers.
        lengths: tokens of each step.
        answer: text behind the reasoning.
        right: by the first reward.
        tokens: of the whole response.
        critical: which steps are critical, where the task knows it.
    """

    prompt: str
    steps: tuple[str, ...]
    weights: tuple[float, ...]
    lengths: tuple[int, ...]
    answer: str
    right: bool
    tokens: int
    critical: tuple[bool, ...] | None


@dataclass(frozen=True)
class Evaluation:
    """Means over the held-out problems.

    Args:
        accuracy: share of right answers.
        ci95: half width of its 95 % interval (normal approximation).
        mean_tokens: per response, reasoning and answer.
        critical_share: tokens in critical steps over tokens in all steps: by the task's own knowledge over all
            responses where it has it, else as estimated; None where no right response has steps.
        estimated_critical_share: by the importance estimator, over right responses.
        importance_auc: probability that the estimator ranks a critical step of a right response above a redundant one,
            where the task knows them; None without both kinds.
        responses: how many.
    """

    accuracy: float
    ci95: float
    mean_tokens: float
    critical_share: float | None
    estimated_critical_share: float | None
    importance_auc: float | None
    responses: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def evaluate(
    model: Any, tokenizer: Any, problems: Problems, recipe: Recipe, *, rank: int = 0, world: int = 1
) -> tuple[Evaluation, list[Response]]:
    """Answer every held-out problem once, every process its share of them.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        problems: the recipe's.
        recipe: says how to sample, score and split.
        rank: this process.
        world: how many there are.
    """
    rows = problems.held_out[rank::world]
    size = recipe.rollout.batch_size
    found: list[Response] = []
    for begin in range(0, len(rows), size):
        # Seeded by the recipe's first held-out row, not the stage: before and after differ by the model alone.
        seed = 1_000_003 * (rank + 1) + begin
        found += _answer(model, tokenizer, rows[begin : begin + size], problems, recipe, seed)
    every: list[Response] = gather_object(found) if world > 1 else found
    return summarise(every), every


def summarise(responses: Sequence[Response]) -> Evaluation:
    """Means over responses, of which there must be one."""
    count = len(responses)
    accuracy = sum(response.right for response in responses) / count
    known = [(response, response.critical) for response in responses if response.critical is not None]
    weighed = [(response, [value >= CRITICAL_FROM for value in response.weights]) for response in responses]
    estimated = _share([(response, critical) for response, critical in weighed if critical])
    return Evaluation(
        accuracy=accuracy,
        ci95=1.96 * math.sqrt(accuracy * (1 - accuracy) / count),
        mean_tokens=sum(response.tokens for response in responses) / count,
        critical_share=_share(known) if known else estimated,
        estimated_critical_share=estimated,
        importance_auc=_auc(known),
        responses=count,
    )


def importance_settings(recipe: Recipe) -> SCPO:
    """The estimator, window and temperature of the recipe's first SCPO stage, or the defaults."""
    stage = next((stage for stage in recipe.stages if isinstance(stage, ScpoStage)), None)
    if stage is None or stage.importance in ("uniform", "random", "oracle"):
        return SCPO()
    return SCPO(importance=stage.importance, window=stage.window, temperature=stage.temperature)


def step_weights(
    model: Any, tokenizer: Any, items: Sequence[tuple[str, Sequence[int], Steps]], settings: SCPO
) -> list[list[float]]:
    """Weight of every step of some responses, given as prompt, tokens and split."""
    import torch

    assert settings.importance in ("next-steps", "answer-removal", "prefix-gain")
    probes = [
        probe(tokenizer(prompt).input_ids, ids, steps, estimator=settings.importance, window=settings.window)
        for prompt, ids, steps in items
    ]
    with torch.no_grad():
        gains = (
            score_packed(model, probes, max_tokens=settings.max_tokens)
            if takes_masks(model)
            else score_naive(model, probes)
        )
    return [[weight(gain, settings.temperature) for gain in row] for row in gains]


def split_response(tokenizer: Any, prompt: str, ids: Sequence[int], recipe: Recipe) -> Steps:
    """How a response splits under the recipe's rules."""

    def decode(part: Sequence[int]) -> str:
        text: str = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    return split_steps(ids, decode, recipe.steps, opened=prompt_opens_reasoning(prompt, recipe.steps))


def _answer(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], problems: Problems, recipe: Recipe, seed: int
) -> list[Response]:
    prompts = [row["prompt"] for row in rows]
    ids = sample(model, tokenizer, prompts, recipe.rollout, seed=seed)
    texts = [text_of(tokenizer, row) for row in ids]
    reward = build_reward(recipe.reward[0], recipe.steps)
    right = [score > RIGHT_ABOVE for score in call(reward, rows, texts, ids)]
    splits = [split_response(tokenizer, prompt, row, recipe) for prompt, row in zip(prompts, ids, strict=True)]
    judged = [at for at, ok in enumerate(right) if ok]
    weights = dict(
        zip(
            judged,
            step_weights(
                model, tokenizer, [(prompts[a], ids[a], splits[a]) for a in judged], importance_settings(recipe)
            ),
            strict=True,
        )
    )
    return [
        _response(tokenizer, prompts[at], ids[at], splits[at], right[at], weights.get(at, []), problems)
        for at in range(len(rows))
    ]


def _response(
    tokenizer: Any,
    prompt: str,
    ids: Sequence[int],
    split: Steps,
    right: bool,
    weights: Sequence[float],
    problems: Problems,
) -> Response:
    steps = tuple(tokenizer.decode(ids[start:end]) for start, end in split.spans)
    critical = None
    if problems.weigh is not None:
        critical = tuple(problems.weigh(step) >= CRITICAL_FROM for step in steps)
    answer = tokenizer.decode(ids[split.answer_start :])
    return Response(prompt, steps, tuple(weights), tuple(split.lengths), answer, right, len(ids), critical)


def _share(responses: Sequence[tuple[Response, Sequence[bool]]]) -> float | None:
    """Tokens in critical steps over tokens in all steps."""
    total = sum(sum(response.lengths) for response, _ in responses)
    part = sum(
        length
        for response, critical in responses
        for length, yes in zip(response.lengths, critical, strict=True)
        if yes
    )
    return part / total if total else None


def _auc(responses: Sequence[tuple[Response, Sequence[bool]]]) -> float | None:
    """The area under the curve by counting pairs, ties for half."""
    pairs = [
        (value, yes)
        for response, critical in responses
        if response.weights
        for value, yes in zip(response.weights, critical, strict=True)
    ]
    high, low = ([value for value, yes in pairs if yes is kind] for kind in (True, False))
    if not high or not low:
        return None
    return sum((a > b) + 0.5 * (a == b) for a in high for b in low) / (len(high) * len(low))
