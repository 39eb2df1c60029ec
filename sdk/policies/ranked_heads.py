"""A ranking of all KV heads of a model by a profile (``thinkkv patch --score retrieval``)."""

from __future__ import annotations

from collections.abc import Iterable

from thinkkv.patches.errors import ProfileMismatchError

HeadScores = tuple[tuple[float, ...], ...]
"""[layers][KV heads], higher keeps more."""

SHARE = 0.2
"""Of all KV heads, the best that answers cannot do without."""


def check_ranking(policy: str, scores: HeadScores) -> None:
    """Raise ProfileMismatchError where a policy that needs a profile has none."""
    if not scores:
        raise ProfileMismatchError(
            f"{policy} chooses its heads by a profile - calibrate one with "
            "`thinkkv patch --score retrieval` and pass it"
        )


def ranked(scores: HeadScores, layers: Iterable[int]) -> list[tuple[int, int]]:
    """(layer, KV head) of these layers, best score first."""
    heads = [(layer, head) for layer in layers for head in range(len(scores[layer]))]
    return sorted(heads, key=lambda head: -scores[head[0]][head[1]])


def best_heads(scores: HeadScores, share: float = SHARE) -> tuple[tuple[int, ...], ...]:
    """Per layer, its heads among the best ``share`` of the whole model."""
    order = ranked(scores, range(len(scores)))
    chosen = set(order[: round(share * len(order))])
    return tuple(tuple(head for head in range(len(row)) if (layer, head) in chosen) for layer, row in enumerate(scores))
