"""Calibrate a head profile: score every KV head over a set of prompts, and fix the classes.

``distance`` averages Task-KV's distance from the semantic center over the prompts of a task. ``retrieval`` is ours: how
long a head stays when heads that an answer does not need are eliminated (``sdk/elimination.py``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from thinkkv.patches.architecture import LayerShape
from thinkkv.patches.errors import ProfileMismatchError, ThinkKVError
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, everything
from thinkkv.sdk.elimination import Progress, elimination_ranks
from thinkkv.sdk.evaluating import evaluating, read
from thinkkv.sdk.hidden_facts import builtin_prompts, hidden_facts
from thinkkv.sdk.patching import apply
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies import Policy, TaskKV
from thinkkv.sdk.policies.ranked_heads import best_heads
from thinkkv.sdk.policies.task_kv import choose_heads
from thinkkv.sdk.profile import SCORES, HeadProfile, fingerprint_of
from thinkkv.sdk.separator import head_distances

MAX_PROMPT_TOKENS = 8192


@dataclass(frozen=True)
class HeadScorer(Policy):
    """Keeps everything and notes a score per head: a policy, so that calibration takes the way of every prompt."""

    name: ClassVar[str] = "calibration"

    @property
    def smallest(self) -> int:
        return 0

    def layer_budgets(self, layers: Sequence[LayerPrompt], budget: Budget) -> list[LayerBudget]:
        return everything(layers)

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        return KeepPlan.everything(prompt, head_scores=self.score(prompt))

    def score(self, prompt: PromptView) -> torch.Tensor:
        raise TypeError("a scorer must define score")


@dataclass(frozen=True)
class _DistanceScorer(HeadScorer):
    def score(self, prompt: PromptView) -> torch.Tensor:
        options = TaskKV()
        scores = prompt.window_scores(options.observation_window)
        return head_distances(prompt, scores, top=options.top, unit=options.unit, reduction=options.reduction)


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] | None = None,
    *,
    score: str = "distance",
    progress: Progress = iter,
) -> HeadProfile:
    """Score the model's KV heads and fix their classes.

    Args:
        model: a supported model that is not patched.
        tokenizer: its tokenizer.
        prompts: texts of the task, for ``distance``; without any, the built-in set. ``retrieval`` makes its own.
        score: ``distance`` or ``retrieval``.
        progress: wraps the iteration over prompts, or rounds of elimination, for a progress bar.

    Returns:
        The profile; ``save`` writes it with its picture.

    Raises:
        ProfileMismatchError: an unknown score, or no usable prompt.
    """
    if score not in SCORES:
        raise ProfileMismatchError(f"no calibration score {score!r} - choose one of {', '.join(SCORES)}")
    if score == "retrieval":
        facts = hidden_facts(tokenizer)
        texts, scores = [fact.text for fact in facts], torch.tensor(elimination_ranks(model, facts, progress))
    else:
        texts = [text for text in (prompts if prompts is not None else builtin_prompts()) if text.strip()]
        if not texts:
            raise ProfileMismatchError("no prompt to calibrate on - every text was empty")
        prompt_ids = [tokenizer(text).input_ids[:MAX_PROMPT_TOKENS] for text in texts]
        found = [head_scores(model, ids, _DistanceScorer()) for ids in progress(prompt_ids)]
        scores = torch.tensor(found).mean(dim=0)
    with apply(model) as handle:
        shapes = handle.shapes
    return _profile(model, shapes, score, scores, texts)


@torch.inference_mode()
def head_scores(model: nn.Module, ids: Sequence[int], scorer: HeadScorer) -> list[list[float]]:
    """[layers][KV heads]: what a scorer makes of one prompt."""
    with apply(model, policy=scorer, ratio=1.0) as handle, evaluating(model):
        cache = handle.new_cache()
        read(model, ids, cache)
        found = [layer.head_scores[0] for layer in handle.report(cache).layers]
    if any(scores is None for scores in found):
        raise ThinkKVError("a layer gave no scores - report this as a bug")
    return [list(scores) for scores in found if scores is not None]


def _profile(
    model: nn.Module, shapes: Sequence[LayerShape], score: str, scores: torch.Tensor, texts: Sequence[str]
) -> HeadProfile:
    rows = tuple(tuple(row) for row in scores.tolist())
    classes = _distance_classes(shapes, scores) if score == "distance" else best_heads(rows)
    return HeadProfile(
        score=score,
        scores=rows,
        heterogeneous=classes,
        fingerprint=fingerprint_of(model),
        calibration={"prompts": len(texts), "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest()},
    )


def _distance_classes(shapes: Sequence[LayerShape], scores: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    policy = TaskKV()
    return tuple(
        choose_heads(
            row,
            policy.heterogeneous_count(shape.kv_heads, shape.query_heads, layer, len(shapes)),
            nearest=policy.nearest != "none",
        )
        for layer, (shape, row) in enumerate(zip(shapes, scores, strict=True))
    )
