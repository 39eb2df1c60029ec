"""Bounded decoding: fixed size, kept ends, and logits equal to dense attention over exactly what was held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from tests.tiny_models import Case
from thinkkv import sdk
from thinkkv.sdk.bounded import SEGMENT
from thinkkv.sdk.policies import AdaKV, Full, KVzip, Policy, RehearsedKV, SnapKV, StreamingLLM, TaskKV

PROMPT, STEPS = 90, 150
POLICIES = [
    TaskKV(sinks=2, recent=20, observation_window=8, top=32),
    StreamingLLM(),
    SnapKV(observation_window=8),
    AdaKV(observation_window=8),
    KVzip(sinks=2, recent=8, whole=66),
]
REHEARSED = RehearsedKV(head_scores=((0.2, 1.0, 0.3, 0.4),) * 3, sinks=2, recent=5, whole=42)


def run(model: Any, policy: Policy, ids: torch.Tensor, steps: int, **budget: Any) -> tuple[Any, Any, list[Any], Any]:
    """Feed a prompt and then token by token; also what was kept before each step, and the report after each."""
    kept, reports, logits = [], [], []
    with torch.inference_mode(), sdk.apply(model, policy=policy, decode="bounded", **budget) as handle:
        cache = handle.new_cache()
        logits.append(model(ids[:, :PROMPT], past_key_values=cache).logits[:, -1:])
        for step in range(steps):
            kept.append(cache.kept_positions())
            logits.append(model(ids[:, PROMPT + step : PROMPT + step + 1], past_key_values=cache).logits)
            reports.append(handle.report(cache))
    return torch.cat(logits, dim=1), cache, kept, reports


@torch.inference_mode()
def dense_logits(model: Any, ids: torch.Tensor, kept: Sequence[Any]) -> torch.Tensor:
    """Float64 softmax attention in which the query of step s sees what was kept before it, and itself."""
    seen = torch.ones(len(ids[0]), len(ids[0]), dtype=torch.bool).tril()

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        out = torch.zeros_like(query)
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            own = seen.clone()
            for step, layers in enumerate(kept):
                own[PROMPT + step] = False
                own[PROMPT + step, layers[module.layer_idx][0][head // group] + [PROMPT + step]] = True
            scores = query[0, head].double() @ key[0, head // group].double().T * scaling
            weights = scores.masked_fill(~own, float("-inf")).softmax(-1)
            out[0, head] = weights @ value[0, head // group].double()
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_bounded_reference", attention)
    previous = model.config._attn_implementation
    model.set_attn_implementation("test_bounded_reference")
    try:
        return model(ids, use_cache=False).logits[:, PROMPT - 1 :]
    finally:
        model.set_attn_implementation(previous)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_logits_equal_dense_attention_over_what_was_held(policy):
    model = Case("llama", kv_heads=4).model()
    ids = torch.randint(1, 97, (1, PROMPT + STEPS))
    found, _, kept, _ = run(model, policy, ids, STEPS, ratio=0.5)
    expected = dense_logits(model, ids, kept)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    assert len(kept[-1][0][0][-1]) < PROMPT + STEPS - 1, "nothing was ever cut back"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("budget", [{"ratio": 0.5}, {"budget": 40}], ids=str)
def test_bytes_follow_the_formula_at_every_step(policy, budget):
    model = Case("qwen3", kv_heads=2).model()
    ids = torch.randint(1, 97, (2, PROMPT + STEPS))
    *_, reports = run(model, policy, ids, STEPS, **budget)
    for report in reports:
        assert report.bytes.used == report.bytes.planned <= report.bytes.promised


def test_a_uniform_policy_stops_growing():
    model = Case("llama", kv_heads=4).model()
    *_, reports = run(model, SnapKV(observation_window=8), torch.randint(1, 97, (1, 600)), 500, ratio=0.5)
    assert len({report.bytes.physical for report in reports}) == 1
    entry = 2 * 16 * 4
    assert max(report.bytes.used for report in reports) < (PROMPT // 2 + SEGMENT) * entry * 4 * len(reports[0].layers)


@pytest.mark.parametrize("policy", [POLICIES[0], REHEARSED], ids=lambda policy: policy.name)
def test_full_heads_keep_everything_and_others_keep_their_ends(policy):
    model = Case("llama", kv_heads=4).model()
    _, cache, _, reports = run(model, policy, torch.randint(1, 97, (1, PROMPT + STEPS)), STEPS, ratio=0.5)
    everything = list(range(PROMPT + STEPS))
    for layer, kept in zip(reports[-1].layers, cache.kept_positions(), strict=True):
        assert layer.heterogeneous
        for head, positions in enumerate(kept[0]):
            if head in layer.heterogeneous:
                assert positions == everything
            else:
                assert positions[: policy.sinks] == everything[: policy.sinks]
                assert positions[-policy.recent :] == everything[-policy.recent :]
                assert len(positions) < PROMPT // 2 + SEGMENT


@pytest.mark.parametrize(
    "short",
    [TaskKV(sinks=4, recent=100, observation_window=8, top=32), replace(REHEARSED, sinks=4, recent=12, whole=100)],
    ids=lambda policy: policy.name,
)
def test_a_short_prompt_is_separated_for_the_decoding_to_come(short):
    model = Case("llama", kv_heads=4).model()
    _, cache, _, reports = run(model, short, torch.randint(1, 97, (1, PROMPT + 200)), 200, ratio=0.5)
    lengths = {len(positions) for positions in cache.kept_positions()[0][0]}
    assert reports[-1].layers[0].heterogeneous
    assert max(lengths) == PROMPT + 200
    assert min(lengths) < 104 + SEGMENT


def test_the_full_policy_has_nothing_to_bound():
    model = Case("llama", kv_heads=4).model()
    *_, reports = run(model, Full(), torch.randint(1, 97, (1, PROMPT + STEPS)), STEPS)
    assert reports[-1].bytes.used == reports[-1].bytes.full


def test_an_unknown_mode_is_refused():
    with pytest.raises(sdk.BudgetError, match="append or bounded"):
        sdk.apply(Case("llama", kv_heads=4).model(), decode="ring")  # type: ignore[arg-type]
