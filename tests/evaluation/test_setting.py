"""Policies with options, as the command line names them."""

from __future__ import annotations

import pytest

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.evaluation.setting import parse_policy, settings
from thinkkv.sdk.policies import Full, SnapKV, TaskKV


def test_options_stand_behind_plus_signs():
    assert parse_policy("snapkv") == SnapKV()
    assert parse_policy("task-kv+nearest=none+recent=128+beta=0.5") == TaskKV(nearest="none", recent=128, beta=0.5)


def test_how_tokens_are_stored_is_an_option_of_every_policy_and_unsaid_where_it_is_the_usual():
    assert parse_policy("full+cache_dtype=int8") == Full(cache_dtype="int8")
    assert parse_policy("snapkv+cache_dtype=int8").options == {**SnapKV().options, "cache_dtype": "int8"}
    assert parse_policy("snapkv+cache_dtype=model") == SnapKV()
    assert "cache_dtype" not in SnapKV().options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snap", "snapkv"),
        ("task-kv+near=none", "nearest"),
        ("task-kv+nearest=some", "on-top"),
        ("task-kv+recent=many", "number"),
        ("task-kv+head_scores=1", "no option"),
        ("full+recent=1", "no option"),
        ("full+cache_dtype=int4", "int8"),
    ],
)
def test_a_wrong_option_is_explained(text, said):
    with pytest.raises(BudgetError, match=said):
        parse_policy(text)


def test_the_full_cache_has_one_ratio():
    found = settings(["full", "snapkv"], [0.4, 0.2, 0.4])
    assert [(setting.name, setting.ratio) for setting in found] == [("full", 1.0), ("snapkv", 0.4), ("snapkv", 0.2)]
