"""FullKVAttention: matrix products over the whole buffer give what attention to its used part gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from tests.export.operators import DIM, assert_equal, one_node, oracle_of, results, rotary, runtime_of
from thinkkv.export.onnx.cursor import FULL_KV_OUTPUTS, full_kv_cursor_node
from thinkkv.export.onnx.domain import HeadGroup
from thinkkv.export.onnx.full_kv_attention import INPUTS, full_kv_node

OUTPUTS = ("output", "present_key", "present_value")


def feeds_of(
    heads: HeadGroup,
    past: int,
    new: int,
    length: int,
    *,
    by_products: bool,
    seed: int,
    blocks: int = 1,
    cache_dtype: Any = np.float32,
) -> dict[str, Any]:
    draw, total = np.random.default_rng(seed), past + new

    def states(count: int) -> Any:
        return draw.standard_normal((1, new, count * heads.head_dim), dtype=np.float32)

    # What was never written is large, but finite as a runtime's buffers are: a weight of nothing leaves nothing of it.
    cache = np.full((2, 1, heads.kv_heads, length, DIM), 6e4, cache_dtype)
    cache[..., :past, :] = draw.standard_normal(cache[..., :past, :].shape)
    feeds = {
        "query": 3 * states(heads.query_heads),
        "key": states(heads.kv_heads),
        "value": states(heads.kv_heads),
        "past_key": cache[0],
        "past_value": cache[1],
        "seqlens_k": np.array([total - 1], np.int32),
        "total_sequence_length": np.array(total, np.int32),
        "position_ids": np.arange(past, total)[None],
        "write_slot": np.array([total - 1]),
        "mask": np.where(np.arange(length) < total, 0, -3e38).astype(np.float32),
        "blocks": np.array([blocks]),
        "by_products": np.array(by_products),
    }
    return feeds | rotary(length)


def compare(heads: HeadGroup, feeds: dict[str, Any], library: Path | None = None) -> None:
    outputs = results(OUTPUTS, feeds["past_key"].dtype)
    model = one_node(full_kv_node("attention", INPUTS, OUTPUTS, heads=heads), feeds, outputs)
    total = int(feeds["total_sequence_length"])
    assert_equal(runtime_of(model, library).run(None, feeds), oracle_of(model).run(None, feeds), [total])


@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    past=st.integers(0, 70),
    spare=st.integers(0, 40),
    blocks=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
)
def test_single_tokens_equal_the_reference(
    kv_heads: int, group: int, past: int, spare: int, blocks: int, seed: int, library: Path
) -> None:
    heads = HeadGroup(kv_heads * group, kv_heads, DIM, 0.3)
    length = -(-(past + 1 + spare) // blocks) * blocks
    feeds = feeds_of(heads, past, 1, length, by_products=True, seed=seed, blocks=blocks)
    compare(heads, feeds)
    compare(heads, feeds, library)


@pytest.mark.parametrize(("past", "new", "by_products"), [(0, 9, False), (20, 1, False), (20, 1, True), (20, 7, False)])
def test_float16_caches_equal_the_reference(past: int, new: int, by_products: bool, library: Path) -> None:
    heads = HeadGroup(6, 2, DIM, 0.3)
    feeds = feeds_of(heads, past, new, 40, by_products=by_products, seed=1, blocks=5, cache_dtype=np.float16)
    compare(heads, feeds)
    compare(heads, feeds, library)


@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 9), (20, 1), (20, 7)])
def test_everything_else_equals_the_reference(past: int, new: int) -> None:
    heads = HeadGroup(6, 2, DIM, 0.3)
    compare(heads, feeds_of(heads, past, new, 40, by_products=False, seed=1))


@pytest.mark.parametrize(
    ("past", "new", "length", "expected"),
    [
        (1999, 1, 2000, True),  # a full buffer
        (1023, 1, 2048, True),  # just long enough, half of the buffer
        (1022, 1, 2044, False),  # too few tokens
        (1998, 1, 4000, False),  # less than half of the buffer
        (0, 2000, 2000, False),  # a prompt
    ],
)
@pytest.mark.parametrize("appends", [True, False])
def test_when_the_products_serve(past: int, new: int, length: int, expected: bool, appends: bool) -> None:
    feeds = {
        "input_ids": np.ones((1, new), np.int64),
        "attention_mask": np.ones((1, past + new), np.int64),
        "past_key": np.zeros((1, 1, length, 2), np.float32),
        "appends": np.array([appends]),
    }
    write_slot, mask, blocks, by_products, appends_by_products, stock = run_cursor(feeds)
    assert write_slot.tolist() == [past + new - 1]
    assert (mask == 0).tolist() == [slot < past + new for slot in range(length)]
    assert bool(by_products) is expected
    assert stock.tolist() == [appends and not expected]
    assert appends_by_products.tolist() == [appends and expected]
    assert length % int(blocks[0]) == 0


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 1), (13, 13), (17, 1), (32, 16), (34, 2), (4096, 16), (7966, 14), (9001, 1)]
)
def test_a_buffer_is_cut_into_as_many_equal_blocks_as_it_has_of_at_most_16(length: int, expected: int) -> None:
    feeds = {
        "input_ids": np.ones((1, 1), np.int64),
        "attention_mask": np.ones((1, 1), np.int64),
        "past_key": np.zeros((1, 1, length, 2), np.float32),
        "appends": np.array([True]),
    }
    assert run_cursor(feeds)[2].tolist() == [expected]


def run_cursor(feeds: dict[str, Any]) -> list[Any]:
    kinds = (TensorProto.INT64, TensorProto.FLOAT, TensorProto.INT64, *(TensorProto.BOOL,) * 3)
    node = full_kv_cursor_node("past_key", "appends", FULL_KV_OUTPUTS)
    session = runtime_of(one_node(node, feeds, dict(zip(FULL_KV_OUTPUTS, kinds, strict=True))))
    outputs: list[Any] = session.run(None, feeds)
    return outputs
