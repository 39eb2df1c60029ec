"""Invariant 1: with the whole cache kept, a patched model generates what the unpatched one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conformance.cases import CASES
from tests.conformance.closeness import RMS, assert_close
from tests.conformance.decoding import decoded, in_steps
from tests.conformance.small_policies import COMPRESSING, small_policy
from tests.tiny_models import Batch, Case
from thinkkv import sdk

NEW_TOKENS = 12


def greedy(model: Any, batch: Batch) -> torch.Tensor:
    """[B, NEW_TOKENS] new tokens."""
    out = model.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[:, batch.ids.shape[1] :]


# `full` with every case; one of the compressing policies at ratio 1 with each, in turn.
POLICY_OF = {case: COMPRESSING[i % len(COMPRESSING)] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_tokens_are_those_of_the_unpatched_model(case: Case) -> None:
    model, batch = case.model(), case.batch()
    tokens = greedy(model, batch)
    stock = decoded(model, batch, in_steps(tokens))
    for policy in ("full", POLICY_OF[case]):
        with sdk.apply(model, policy=small_policy(policy, case.kv_heads), ratio=1.0):
            patched = decoded(model, batch, in_steps(tokens))
            generated = greedy(model, batch)
        assert_close(patched, stock, rms=RMS[case.dtype])
        if case.dtype == torch.float32:
            assert generated.tolist() == tokens.tolist()
        else:
            # Low precision makes ties: tokens must agree where the stock model's choice is beyond rounding.
            first, second = stock.float().topk(2).values.unbind(-1)
            clear = first - second > 2 * (patched - stock).float().abs().max()
            assert clear.any()
            assert torch.equal(patched.argmax(-1)[clear], stock.argmax(-1)[clear])


@pytest.mark.parametrize("variant", ["llama3", "qwen2-mixed", "qwen3", "mistral-window"])
def test_a_single_token_is_a_prompt(variant: str) -> None:
    case = Case(variant, kv_heads=2, lengths=(1,))
    tokens = greedy(case.model(), case.batch())
    with sdk.apply(case.model(), policy="task-kv", ratio=0.1):
        assert greedy(case.model(), case.batch()).tolist() == tokens.tolist()
