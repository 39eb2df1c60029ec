"""The cross product of the conformance tests, and how it is thinned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import torch

from tests.conformance.dense_reference import DenseReference
from tests.tiny_models import KV_HEADS, PADDED, VARIANTS, Case, tiny_model, windows

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
