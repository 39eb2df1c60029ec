"""From outcomes of samples to the rows of a table: means with intervals, and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from thinkkv.sdk.evaluation.journal import Journal, Outcome
from thinkkv.sdk.evaluation.runner import Cell, key
from thinkkv.sdk.evaluation.scoring import effective_count, perplexity, wilson
from thinkkv.sdk.evaluation.setting import Setting

Row = dict[str, Any]


def rows(journal: Journal, cells: Iterable[Cell], settings: Sequence[Setting], samples: int) -> list[Row]:
    """One row for every cell and setting that has outcomes, in their order."""
    found = []
    for cell in cells:
        for setting in settings:
            keys = (key(cell, number, setting) for number in range(cell.task.count(samples)))
            outcomes = [journal.outcomes[one] for one in keys if one in journal.outcomes]
            if outcomes:
                found.append(_row(cell, setting, outcomes))
    return found


def _row(cell: Cell, setting: Setting, outcomes: Sequence[Outcome]) -> Row:
    score, interval = _mean(cell, outcomes)
    return {
        "task": cell.task.name,
        "policy": setting.name,
        "ratio": setting.ratio,
        "context": cell.size,
        "question": cell.question,
        "metric": cell.task.metric,
        "samples": len(outcomes),
        "score": round(score, 4),
        "ci95": [round(bound, 4) for bound in interval] if interval else None,
        "answer_loss": _mean_of_all([outcome.loss for outcome in outcomes]),
        "divergence": _mean_of_all([outcome.divergence for outcome in outcomes]),
        "cache_bytes": _rounded_mean([outcome.cache_bytes for outcome in outcomes]),
        "used_bytes": _rounded_mean([outcome.used_bytes for outcome in outcomes]),
        "compressed_tokens": _rounded_mean([outcome.tokens for outcome in outcomes]),
    }


def _mean(cell: Cell, outcomes: Sequence[Outcome]) -> tuple[float, tuple[float, float] | None]:
    scores = [outcome.score for outcome in outcomes]
    if cell.task.metric == "perplexity":
        return perplexity(scores)
    mean = sum(scores) / len(scores)
    return mean, wilson(mean, effective_count(scores, [cell.task.text_of(outcome.sample) for outcome in outcomes]))


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """None where a value is missing: a mean of some of the samples would be of others than the score's."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if len(known) == len(values) else None


def _rounded_mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values))
