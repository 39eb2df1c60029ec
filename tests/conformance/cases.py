"""The cross product of the conformance tests, and how it is thinned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch

from tests.conformance.dense_reference import DenseReference, Kept, Stored
from tests.conformance.stored_reference import StoredReference
from tests.tiny_models import KV_HEADS, PADDED, VARIANTS, Batch, Case, tiny_model, windows

DTYPES = (torch.float32, torch.bfloat16)

CASES = [
    Case(variant, kv_heads, dtype, lengths)
    for variant, kv_heads, dtype, lengths in product(VARIANTS, KV_HEADS, DTYPES, ((63,), PADDED))
]


def with_policies(policies: Sequence[str], *, every: int) -> list[tuple[Case, str]]:
    """Each case with every ``every``-th policy, the next case starting one policy further.

    With ``every=3`` each (variant, KV heads, policy) occurs at least once, in changing dtypes and batches, and so
    does each pair of any two properties. What interacts with the policy is how many KV heads there are and whether
    layers slide; the full cross would repeat the rest.
    """
    return [
        (case, policy)
        for i_case, case in enumerate(CASES)
        for i_policy, policy in enumerate(policies)
        if (i_case + i_policy) % every == 0
    ]


@cache
def reference_of(variant: str, kv_heads: int, dtype: torch.dtype) -> DenseReference:
    """The dense reference of a tiny model, one instance per session."""
    return DenseReference(tiny_model(variant, kv_heads, dtype), windows(variant))


@cache
def stored_reference_of(
    variant: str, kv_heads: int, dtype: torch.dtype = torch.float32, cache_dtype: str = "model"
) -> StoredReference:
    """The same for a cache that does not store what the model computed."""
    return StoredReference(tiny_model(variant, kv_heads, dtype), windows(variant), cache_dtype)


@dataclass(frozen=True)
class Compressed:
    """What a cache held right after its prompt.

    Args:
        kept: positions.
        entries: stored there; None where these are the prompt's own, which no test takes from the cache.
    """

    kept: Kept
    entries: Stored | None

    @classmethod
    def of(cls, cache: Any) -> Compressed:
        """As it is now."""
        own = cache.compression.policy.reread_queries == 0
        return cls(cache.kept_positions(), None if own else cache.kept_entries())

    def logits(self, case: Case, whole: Batch, *, prompt: int) -> torch.Tensor:
        """Of dense attention to this and to all that follows, from the last of ``prompt`` columns on."""
        if self.entries is None:
            return reference_of(case.variant, case.kv_heads, case.dtype).logits(whole, self.kept, prompt=prompt)
        reference = stored_reference_of(case.variant, case.kv_heads, case.dtype)
        return reference.logits(whole, self.kept, prompt=prompt, entries=self.entries)
