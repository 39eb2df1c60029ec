"""Invariants 1 to 4 on real weights: SmolLM2-135M-Instruct, on a real prompt of some 700 tokens."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any

import pytest
import torch

from tests.conformance.closeness import RMS, assert_close
from tests.conformance.decoding import Conversation, decoded, in_steps, joined
from tests.conformance.dense_reference import DenseReference
from tests.tiny_models import Batch
from thinkkv import sdk
from thinkkv.sdk.policies import AdaKV, Policy, PyramidKV, RetrievalKV, StreamingLLM, TaskKV

TOKENS = 700
STEPS = 6
LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64


@pytest.fixture(scope="module")
def prompt(smollm2: tuple[Any, Any]) -> Batch:
    lines = files("thinkkv.sdk").joinpath("prompts/calibration.jsonl").read_text(encoding="utf-8").splitlines()
    ids = smollm2[1](json.loads(lines[0])["prompt"], return_tensors="pt")["input_ids"][:, :TOKENS]
    assert ids.shape[1] > 600
    return Batch(ids, torch.ones_like(ids))


@pytest.fixture(scope="module")
def stock_tokens(smollm2: tuple[Any, Any], prompt: Batch) -> torch.Tensor:
    """[1, STEPS] the unpatched model's greedy tokens."""
    return greedy(smollm2[0], prompt)


@pytest.fixture(scope="module")
def reference(smollm2: tuple[Any, Any]) -> DenseReference:
    return DenseReference(smollm2[0], [None] * LAYERS)


@pytest.fixture(scope="module")
def bfloat16_model(smollm2: tuple[Any, Any]) -> Any:
    return copy.deepcopy(smollm2[0]).to(torch.bfloat16)


def greedy(model: Any, prompt: Batch) -> torch.Tensor:
    out = model.generate(
        prompt.ids, attention_mask=prompt.mask, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False
    )
    return out[:, prompt.ids.shape[1] :]


MADE_UP = tuple(tuple(((7 * layer + 5 * head) % 11) / 11 for head in range(KV_HEADS)) for layer in range(LAYERS))

# Fewer recent tokens than published, so that 700 tokens leave a middle to choose from.
TASK_KV = TaskKV(recent=64)
RETRIEVAL_KV = RetrievalKV(head_scores=MADE_UP, recent=64)


@pytest.mark.parametrize("policy", ["full", "task-kv"])
def test_greedy_tokens_are_those_of_the_unpatched_model(
    smollm2: tuple[Any, Any], prompt: Batch, stock_tokens: torch.Tensor, policy: str
) -> None:
    with sdk.apply(smollm2[0], policy=policy, ratio=1.0):
        assert greedy(smollm2[0], prompt).tolist() == stock_tokens.tolist()


# Two groups of rows in a layer, full heads spread over the layers, and a length for every row: the reference takes
# seconds at this length, and the tiny models go through all policies.
@pytest.mark.parametrize("policy", [TASK_KV, RETRIEVAL_KV, AdaKV()], ids=lambda policy: policy.name)
def test_logits_equal_masked_dense_attention(
    smollm2: tuple[Any, Any], prompt: Batch, stock_tokens: torch.Tensor, reference: DenseReference, policy: Policy
) -> None:
    model, following = smollm2[0], in_steps(stock_tokens)
    with sdk.apply(model, policy=policy, ratio=0.4) as handle:
        conversation = Conversation(model, handle.new_cache())
        last = conversation.feed(prompt)[:, -1:]
        kept = conversation.cache.kept_positions()
        found = torch.cat([last, conversation.feed_all(following)], dim=1)
    expected = reference.logits(joined([prompt, *following]), kept, prompt=prompt.ids.shape[1])
    assert_close(found, expected, rms=RMS[torch.float32])


@pytest.mark.parametrize("policy", [TaskKV(), StreamingLLM(), PyramidKV()], ids=lambda policy: policy.name)
def test_bytes_follow_the_formula(smollm2: tuple[Any, Any], prompt: Batch, policy: Policy) -> None:
    check_bytes(smollm2[0], prompt, policy, itemsize=4)


def test_bytes_follow_the_formula_in_bfloat16(bfloat16_model: Any, prompt: Batch) -> None:
    check_bytes(bfloat16_model, prompt, TASK_KV, itemsize=2)


def check_bytes(model: Any, prompt: Batch, policy: Policy, *, itemsize: int) -> None:
    entry, tokens = 2 * HEAD_DIM * itemsize, prompt.ids.shape[1]
    with sdk.apply(model, policy=policy, ratio=0.5) as handle:
        conversation = Conversation(model, handle.new_cache())
        conversation.feed(prompt)
        found = handle.report().bytes
    kept = sum(len(head) for layer in conversation.cache.kept_positions() for head in layer[0])
    assert found.used == found.planned == kept * entry
    assert found.promised == LAYERS * (tokens * KV_HEADS // 2) * entry
    assert found.full == LAYERS * tokens * KV_HEADS * entry
    assert 0.9 * found.promised <= found.used <= found.promised
    assert found.physical <= 1.15 * found.used + 256 * LAYERS * KV_HEADS * entry


def test_bfloat16_logits_stay_as_close_as_the_stock_models(
    smollm2: tuple[Any, Any], bfloat16_model: Any, prompt: Batch, stock_tokens: torch.Tensor
) -> None:
    following = in_steps(stock_tokens)
    exact = decoded(smollm2[0], prompt, following)
    with sdk.apply(bfloat16_model, policy="full"):
        patched = decoded(bfloat16_model, prompt, following)
    assert_close(patched, exact, rms=RMS[torch.bfloat16])


def test_revert_restores_every_bit(smollm2: tuple[Any, Any], prompt: Batch) -> None:
    model = smollm2[0]
    prompt = Batch(prompt.ids[:, :100], prompt.mask[:, :100])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = Conversation(model).feed(prompt)
    with sdk.apply(model):
        greedy(model, prompt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(Conversation(model).feed(prompt), logits)
