"""Prove a patch on the model at hand: nothing changes at full budget, and compressed logits are the right ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from thinkkv.sdk.masked_reference import masked_logits
from thinkkv.sdk.patching import apply
from thinkkv.sdk.policies import Policy
from thinkkv.sdk.profile import HeadProfile

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest accepted logit difference by the logits' standard deviation; half types round at every layer."""


@dataclass(frozen=True)
class Verification:
    """What was found.

    Args:
        identical_at_full_budget: greedy tokens equal the unpatched model's when everything is kept.
        matches_masked_reference: compressed logits equal dense float64 attention under the same keep-mask.
        max_abs_logit_diff: the largest difference seen there.
        bytes_equal_formula: bytes in use are exactly what the keep-plans need, within the promise.
    """

    identical_at_full_budget: bool
    matches_masked_reference: bool
    max_abs_logit_diff: float
    bytes_equal_formula: bool

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return self.identical_at_full_budget and self.matches_masked_reference and self.bytes_equal_formula


@torch.inference_mode()
def verify(
    model: Any,
    ids: torch.Tensor,
    *,
    policy: Policy,
    ratio: float | None,
    budget: int | None,
    profile: HeadProfile | None,
    steps: int = 8,
) -> Verification:
    """Run the checks on one prompt.

    Args:
        model: the unpatched model.
        ids: [1, N] prompt.
        policy, ratio, budget, profile: the patch to check.
        steps: tokens decoded for each check.
    """
    stock = _greedy(model, ids, None, steps).argmax(-1)
    with apply(model, policy=policy, ratio=1.0, profile=profile) as handle:
        whole = _greedy(model, ids, handle.new_cache(), steps).argmax(-1)
    with apply(model, policy=policy, ratio=ratio, budget=budget, profile=profile) as handle:
        cache = handle.new_cache()
        compressed = _greedy(model, ids, cache, steps)
        found, kept = handle.report(cache).bytes, cache.kept_positions()
        # The prompt's own entries are not taken from the cache, unless the policy stores others.
        entries = cache.kept_entries() if policy.reread_queries else None
    followed = torch.cat([ids, compressed.argmax(-1)[:, :-1]], dim=1)
    expected = masked_logits(model, followed, kept, prompt=ids.shape[1], entries=entries)
    difference = (expected - compressed).abs().max().item()
    return Verification(
        identical_at_full_budget=torch.equal(stock, whole),
        matches_masked_reference=difference <= TOLERANCE[compressed.dtype] * expected.float().std().item(),
        max_abs_logit_diff=difference,
        bytes_equal_formula=found.used == found.planned <= found.promised,
    )


def _greedy(model: Any, ids: torch.Tensor, cache: Any, steps: int) -> torch.Tensor:
    """[1, steps, vocabulary]: logits of a greedy continuation."""
    found = []
    for _ in range(steps):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        found.append(out.logits)
    return torch.cat(found, dim=1)
