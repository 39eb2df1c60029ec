"""What policies that want a profile and a second reading refuse, and what they say then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sdk.planning import Model
from thinkkv import sdk
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.policies import Policy, policy_named

SCORES = ((1.0, 0.25), (0.5, 0.75))
PROBE = Model(kv_heads=2, group=1, windows=(None, None), tokens=100, seed=0)

pytestmark = pytest.mark.parametrize("name", ["rehearsed-kv", "reread-kv", "matched-kv"])


def small(name: str) -> Policy:
    return replace(policy_named(name), head_scores=SCORES, sinks=2, recent=3, whole=26)


def test_without_a_profile_it_says_where_to_get_one(name: str) -> None:
    with pytest.raises(sdk.ProfileMismatchError, match=rf"{name} chooses .*`thinkkv patch --score retrieval`"):
        policy_named(name).layer_budgets([LayerPrompt(0, 2, 1000)], Budget(ratio=0.5))


def test_too_small_a_budget_is_told_what_is_enough(name: str) -> None:
    with pytest.raises(sdk.BudgetError, match=rf"{name} needs at least 5 - use --ratio 0\.05 or more"):
        Compression(small(name), Budget(ratio=0.04), PROBE.shapes()).allocate(100)


@pytest.mark.parametrize("missing", ["rehearsed", "rehearsed_sum"])
def test_layers_called_without_their_decoder_are_told_so(name: str, missing: str) -> None:
    view = replace(PROBE.view(0), **{missing: None})
    with pytest.raises(sdk.UnsupportedGenerationError, match=f"{name} needs a prompt that was read twice"):
        small(name).plan(view, LayerBudget(100, per_head=(30, 50)))
