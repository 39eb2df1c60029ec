"""The reference that compressed logits are held against, itself held against the stock eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny_models import new_model, prompts
from thinkkv.sdk.masked_reference import masked_logits, visible

PROMPT, STEPS = 30, 6


def everything(model: Any, lengths: list[int]) -> list[list[list[list[int]]]]:
    heads = model.config.num_key_value_heads
    return [[[list(range(length))] * heads for length in lengths] for _ in range(model.config.num_hidden_layers)]


@pytest.mark.parametrize("variant", ["llama", "llama3", "qwen2", "qwen3", "mistral", "mistral-window", "qwen2-mixed"])
def test_keeping_everything_gives_stock_logits(variant: str) -> None:
    model = new_model(variant, 2)
    ids = prompts([PROMPT + STEPS]).ids
    with torch.inference_mode():
        stock = model(ids).logits[:, PROMPT - 1 :]
    found = masked_logits(model, ids, everything(model, [PROMPT]), prompt=PROMPT)
    assert found.shape == (1, STEPS + 1, model.config.vocab_size)
    torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-3)


def test_padding_does_not_reach_the_real_tokens() -> None:
    model = new_model("llama", 4)
    lengths = [PROMPT, PROMPT - 11]
    padded = prompts(lengths)
    following = prompts([STEPS, STEPS], label="following").ids
    ids = torch.cat([padded.ids, following], dim=1)
    real = torch.cat([padded.mask, torch.ones_like(following)], dim=1).bool()
    found = masked_logits(model, ids, everything(model, lengths), prompt=PROMPT, real=real)
    for sequence in range(2):
        alone = ids[sequence : sequence + 1, real[sequence]]
        with torch.inference_mode():
            stock = model(alone).logits[:, -STEPS - 1 :]
        torch.testing.assert_close(found[sequence], stock[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kv_heads", [8, 2], ids=lambda n: f"KV{n}")
def test_each_head_loses_what_its_plan_evicts(kv_heads: int) -> None:
    """The same in one layer through stock eager attention, which adds a per-head mask given by the caller."""
    model = new_model("llama", kv_heads)
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    ids = prompts([PROMPT + STEPS]).ids
    draw = torch.Generator().manual_seed(kv_heads)
    kept = [[[sorted(torch.randperm(PROMPT, generator=draw)[:9].tolist()) for _ in range(kv_heads)]]]
    found = masked_logits(model, ids, kept, prompt=PROMPT)

    length = PROMPT + STEPS
    mask = torch.full((1, 8, length, length), float("-inf"))
    for head in range(8):
        own = kept[0][0][head // (8 // kv_heads)]
        for query in range(length):
            seen = list(range(query + 1)) if query < PROMPT else [*own, *range(PROMPT, query + 1)]
            mask[0, head, query, seen] = 0.0
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[:, PROMPT - 1 :]
        dense = model(ids, use_cache=False).logits[:, PROMPT - 1 :]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[:, 0], dense[:, 0], rtol=1e-3, atol=1e-3)
    assert (found[:, 1:] - dense[:, 1:]).abs().amax() > 0.1


def test_visible_by_hand() -> None:
    # One padding column, a prompt of three tokens (0, 1, 2), two more; head 0 keeps 0 and 2, head 1 keeps 1.
    real = torch.tensor([False, True, True, True, True, True])
    found = visible([[0, 2], [1]], real, prompt=4, window=None).int().tolist()
    prompt = [[0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    assert found[0] == [*prompt, [0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 1, 1]]
    assert found[1] == [*prompt, [0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 1, 1]]


def test_visible_through_a_window_by_hand() -> None:
    real = torch.ones(4, dtype=torch.bool)
    found = visible([[0, 1]], real, prompt=2, window=2).int().tolist()
    assert found[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_the_model_is_left_as_it_was() -> None:
    model = new_model("qwen3", 2)
    ids = prompts([PROMPT + STEPS]).ids
    before = model.config._attn_implementation
    masked_logits(model, ids, everything(model, [PROMPT]), prompt=PROMPT)
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):
        masked_logits(model, ids, [], prompt=PROMPT)
    assert model.config._attn_implementation == before
