"""Supervised fine-tuning on exact token ids, the second half of SmartThinker's stage 1.

Rows are tokenised here and given to TRL as ids with a completion mask, so that nothing is tokenised twice and nothing
is cut: a row that is longer than the limit is left out whole, counted and reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.recipes.smartthinker.sampling import Sample


@dataclass(frozen=True)
class Tokenised:
    """Rows to train on.

    Args:
        rows: ``input_ids`` and ``completion_mask``.
        too_long: how many were left out.
    """

    rows: list[dict[str, list[int]]]
    too_long: int


def tokenise_traces(rows: Iterable[dict[str, Any]], tokenizer: Any, limit: int | None) -> Tokenised:
    """Rows with a prompt and a completion text."""
    pairs = []
    for row in rows:
        ids = tokenizer(row["completion"], add_special_tokens=False).input_ids
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        pairs.append((tokenizer(row["prompt"]).input_ids, ids))
    return _limited(pairs, limit)


def tokenise_samples(samples: Iterable[Sample], tokenizer: Any, limit: int | None) -> Tokenised:
    """Sampled responses, by the ids that were sampled."""
    return _limited([(tokenizer(item.prompt).input_ids, list(item.ids)) for item in samples], limit)


def _limited(pairs: Sequence[tuple[list[int], list[int]]], limit: int | None) -> Tokenised:
    kept = [(prompt, ids) for prompt, ids in pairs if limit is None or len(prompt) + len(ids) <= limit]
    if not kept:
        raise ThinkKVError(
            f"no row to train on: {len(pairs) - len(kept)} of {len(pairs)} are longer than max_length {limit} - "
            "raise it, or sample more"
        )
    rows = [{"input_ids": prompt + ids, "completion_mask": [0] * len(prompt) + [1] * len(ids)} for prompt, ids in kept]
    return Tokenised(rows, len(pairs) - len(kept))
