"""What policies that want a profile and a second reading refuse, and what they say then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sdk.planning import Model
from thinkkv import sdk
from thinkkv.sdk.budget import Budget, LayerBudget, LayerPrompt
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.policies import RehearsedKV, RereadKV

SCORES = ((1.0, 0.25), (0.5, 0.75))
PROBE = Model(kv_heads=2, group=1, windows=(None, None), tokens=100, seed=0)
Kind = type[RehearsedKV] | type[RereadKV]

pytestmark = pytest.mark.parametrize("kind", [RehearsedKV, RereadKV], ids=lambda kind: kind.name)


def test_without_a_profile_it_says_where_to_get_one(kind: Kind) -> None:
    with pytest.raises(sdk.ProfileMismatchError, match=rf"{kind.name} chooses .*`thinkkv patch --score retrieval`"):
        kind().layer_budgets([LayerPrompt(0, 2, 1000)], Budget(ratio=0.5))


def test_too_small_a_budget_is_told_what_is_enough(kind: Kind) -> None:
    policy = kind(head_scores=SCORES, sinks=2, recent=3, whole=26)
    with pytest.raises(sdk.BudgetError, match=rf"{kind.name} needs at least 5 - use --ratio 0\.05 or more"):
        Compression(policy, Budget(ratio=0.04), PROBE.shapes()).allocate(100)


@pytest.mark.parametrize("missing", ["rehearsed", "rehearsed_sum"])
def test_layers_called_without_their_decoder_are_told_so(kind: Kind, missing: str) -> None:
    view = replace(PROBE.view(0), **{missing: None})
    policy = kind(head_scores=SCORES, sinks=2, recent=3, whole=26)
    with pytest.raises(sdk.UnsupportedGenerationError, match=f"{kind.name} needs a prompt that was read twice"):
        policy.plan(view, LayerBudget(100, per_head=(30, 50)))
