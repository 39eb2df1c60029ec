"""Calibrate a head profile: score every KV head over a set of prompts, and fix the classes.

``distance`` averages Task-KV's distance from the semantic center over the prompts of a task. ``retrieval`` is ours: the
attention mass that a head's queries put on an answer's tokens while that answer is emitted, in synthetic code tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from thinkkv.patches.architecture import LayerShape
from thinkkv.patches.errors import ProfileMismatchError, ThinkKVError
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt, everything
from thinkkv.sdk.code_tables import CodeTable, code_tables
from thinkkv.sdk.patching import apply
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies import Policy, RetrievalKV, TaskKV
from thinkkv.sdk.policies.task_kv import choose_heads
from thinkkv.sdk.profile import SCORES, HeadProfile, fingerprint_of
from thinkkv.sdk.separator import head_distances

Progress = Callable[[Iterable[Any]], Iterable[Any]]

MAX_PROMPT_TOKENS = 8192


@dataclass(frozen=True)
class _Scorer(Policy):
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
class _DistanceScorer(_Scorer):
    def score(self, prompt: PromptView) -> torch.Tensor:
        options = TaskKV()
        scores = prompt.window_scores(options.observation_window)
        return head_distances(prompt, scores, top=options.top, unit=options.unit, reduction=options.reduction)


@dataclass(frozen=True)
class _RetrievalScorer(_Scorer):
    tokens: int = 0
    answer_queries: int = 1
    answer_positions: tuple[int, ...] = ()

    def score(self, prompt: PromptView) -> torch.Tensor:
        first = self.tokens - prompt.tokens  # a sliding window hides what stands before
        seen = [position - first for position in self.answer_positions if position >= first]
        mass = prompt.window_scores(self.answer_queries)[:, seen].sum(dim=1)
        return mass.unflatten(0, (prompt.kv_heads, -1)).amax(dim=1)


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
        progress: wraps the iteration over prompts, for a progress bar.

    Returns:
        The profile; ``save`` writes it with its picture.

    Raises:
        ProfileMismatchError: an unknown score, or no usable prompt.
    """
    if score not in SCORES:
        raise ProfileMismatchError(f"no calibration score {score!r} - choose one of {', '.join(SCORES)}")
    runs: list[tuple[Sequence[int], _Scorer]]
    if score == "retrieval":
        tables = code_tables(tokenizer)
        texts = [table.text for table in tables]
        runs = [(table.ids, _retrieval_scorer(table)) for table in tables]
    else:
        texts = [text for text in (prompts if prompts is not None else builtin_prompts()) if text.strip()]
        runs = [(tokenizer(text).input_ids[:MAX_PROMPT_TOKENS], _DistanceScorer()) for text in texts]
    if not runs:
        raise ProfileMismatchError("no prompt to calibrate on - every text was empty")
    scored = [_scores(model, ids, scorer) for ids, scorer in progress(runs)]
    with apply(model) as handle:
        shapes = handle.shapes
    return _profile(model, shapes, score, torch.tensor(scored).mean(dim=0), texts)


def builtin_prompts() -> list[str]:
    """The small prompt set that ships with thinkkv: reasoning, look-up, code, story, plan."""
    from importlib.resources import files

    lines = (files("thinkkv.sdk") / "prompts" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def _retrieval_scorer(table: CodeTable) -> _RetrievalScorer:
    return _RetrievalScorer(len(table.ids), table.answer_queries, table.answer_positions)


@torch.inference_mode()
def _scores(model: nn.Module, ids: Sequence[int], scorer: _Scorer) -> list[list[float]]:
    """[layers][KV heads] of one prompt."""
    with apply(model, policy=scorer, ratio=1.0) as handle:
        cache = handle.new_cache()
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        was_training = model.training
        model.eval()
        try:
            model(
                torch.tensor([list(ids)], device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        finally:
            model.train(was_training)
        found = [layer.head_scores[0] for layer in handle.report(cache).layers]
    if any(scores is None for scores in found):
        raise ThinkKVError("a layer gave no scores - report this as a bug")
    return [list(scores) for scores in found if scores is not None]


def _profile(
    model: nn.Module, shapes: Sequence[LayerShape], score: str, scores: torch.Tensor, texts: Sequence[str]
) -> HeadProfile:
    rows = tuple(tuple(row) for row in scores.tolist())
    classes = _distance_classes(shapes, scores) if score == "distance" else RetrievalKV(head_scores=rows).best_heads()
    return HeadProfile(
        score=score,
        scores=rows,
        heterogeneous=classes,
        fingerprint=fingerprint_of(model, shapes),
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
