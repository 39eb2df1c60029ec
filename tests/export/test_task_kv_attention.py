"""TaskKVAttention's definitions, run by ONNX Runtime, compute what the numpy reference computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from tests.export.operators import DIM, assert_equal, one_node, oracle_of, results, rotary, runtime_of
from tests.export.test_full_kv_attention import feeds_of as full_feeds_of
from thinkkv.export.onnx.cursor import TASK_KV_OUTPUTS, task_kv_cursor_node
from thinkkv.export.onnx.domain import HeadGroup, Overload
from thinkkv.export.onnx.full_kv_attention import INPUTS as FULL_KV_INPUTS
from thinkkv.export.onnx.full_kv_attention import full_kv_node
from thinkkv.export.onnx.slots import Slots
from thinkkv.export.onnx.task_kv_attention import INPUTS, inputs_of, task_kv_node
from thinkkv.export.onnx.task_kv_step import FULL_OUTPUTS, OUTPUTS

SLOTS = Slots(sinks=3, middle=7, recent=9, observation_window=8, pooling=5, stride=4)
GROUPS = {"gqa": HeadGroup(6, 2, DIM, DIM**-0.5), "mha": HeadGroup(3, 3, DIM, 0.3), "one": HeadGroup(4, 1, DIM, 0.25)}
TURNS = {
    "decode from nothing": [1] * 30,
    "prompt that fits": [9, *[1] * 30],
    "prompt as long as the slots": [22, *[1] * 15],
    "prompt one longer": [23, *[1] * 15],
    "long prompt": [200, *[1] * 30],
    "short second turn": [60, 1, 1, 1, 5, 1, 1],
    "long second turn": [60, *[1] * 5, 90, *[1] * 14],
    "second turn that overflows": [10, 1, 1, 30, 1, 1],
    "turn before the slots are full": [10, *[1] * 13, 4, *[1] * 20, 7, 1],
    "turns that fit between two strides": [60, 2, 1, 2, 1, 3, 1, 2],
}
ANY_SLOTS = st.builds(
    Slots,
    sinks=st.integers(0, 4),
    middle=st.integers(1, 9),
    recent=st.integers(1, 12),
    observation_window=st.integers(1, 10),
    pooling=st.sampled_from((1, 3, 7)),
    stride=st.integers(1, 9),
)


def step(draw: np.random.Generator, group: HeadGroup, slots: Slots, past: int, new: int) -> dict[str, Any]:
    def states(heads: int) -> Any:
        return draw.standard_normal((1, new, heads * group.head_dim), dtype=np.float32)

    seen = past + new
    held, used = slots.in_use(past), slots.in_use(seen)
    return {
        "query": 3 * states(group.query_heads),
        "key": states(group.kv_heads),
        "value": states(group.kv_heads),
        "position_ids": np.arange(past, seen)[None],
        "held": np.array([held]),
        "slots_in_use": np.array([used], np.int32),
        "last_slot": np.array([used - 1], np.int32),
        "appends": np.array([held + new == used]),
        "steps": np.array([held + new == used and new == 1]),
    }


def poisoned(cache: Any, used: int) -> Any:
    """A cache whose slots beyond the used ones hold what would show if it were read."""
    copy = cache.copy()
    copy[:, :, used:] = np.nan
    return copy


def forms_of(
    heads: HeadGroup, slots: Slots, feeds: dict[str, Any], full: HeadGroup | None = None, library: Path | None = None
) -> Callable[[dict[str, Any]], list[Any]]:
    """Runs the operator plain and packed, by its definitions or by the ``library``."""
    names, packed_names = list(feeds), ["" if name in ("key", "value") else name for name in feeds]
    outputs = results(OUTPUTS + FULL_OUTPUTS * (full is not None), feeds["past_key"].dtype)
    node = task_kv_node("attention", names, outputs, heads=heads, slots=slots, full=full)
    plain = runtime_of(one_node(node, feeds, outputs), library)
    node = task_kv_node("attention", packed_names, outputs, heads=heads, slots=slots, full=full)
    packed = runtime_of(one_node(node, packed_feeds(feeds), outputs), library)

    def run(feeds: dict[str, Any]) -> list[Any]:
        if library:  # as its StepCursor has it
            feeds = feeds | {"steps": np.array([feeds["position_ids"].size == 1])}
        return [plain.run(None, feeds), packed.run(None, packed_feeds(feeds))]

    return run


def packed_feeds(feeds: dict[str, Any]) -> dict[str, Any]:
    """Queries, keys and values in one tensor, as the first."""
    states = np.concatenate([feeds[name] for name in ("query", "key", "value")], axis=-1)
    return {name: array for name, array in feeds.items() if name not in ("key", "value")} | {"query": states}


def compare(
    heads: HeadGroup, slots: Slots, turns: list[int], seed: int, library: Path | None = None, cache: Any = np.float32
) -> None:
    """Turn by turn against the reference."""
    draw = np.random.default_rng(seed)
    past_key = past_value = poisoned(np.zeros((1, heads.kv_heads, slots.capacity, DIM), cache), 0)
    past, oracle, forms = 0, None, None
    for new in turns:
        feeds = step(draw, heads, slots, past, new) | {"past_key": past_key, "past_value": past_value} | rotary(800)
        feeds = {name: feeds[name] for name in INPUTS}
        if oracle is None:
            node = task_kv_node("attention", INPUTS, OUTPUTS, heads=heads, slots=slots)
            oracle = oracle_of(one_node(node, feeds, results(OUTPUTS, cache)))
            forms = forms_of(heads, slots, feeds, library=library)
        used = int(feeds["slots_in_use"][0])
        expected = oracle.run(None, feeds)
        for found in forms(feeds):
            assert_equal(found, expected, [used])
        past_key, past_value, past = poisoned(expected[1], used), poisoned(expected[2], used), past + new


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("group", GROUPS)
def test_the_definition_equals_the_reference(group: str, turns: str) -> None:
    compare(GROUPS[group], SLOTS, TURNS[turns], seed=7)


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("group", GROUPS)
def test_the_step_in_c_equals_the_reference(group: str, turns: str, library: Path) -> None:
    compare(GROUPS[group], SLOTS, TURNS[turns], 7, library)


@pytest.mark.parametrize("turns", TURNS)
def test_float16_caches_equal_the_reference(turns: str, library: Path) -> None:
    compare(GROUPS["gqa"], SLOTS, TURNS[turns], 7, cache=np.float16)
    compare(GROUPS["gqa"], SLOTS, TURNS[turns], 7, library, cache=np.float16)


@settings(max_examples=40, deadline=None)
@given(
    slots=ANY_SLOTS,
    turns=st.lists(st.one_of(st.just(1), st.integers(1, 60)), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_slots_and_turns(slots: Slots, turns: list[int], seed: int, library: Path) -> None:
    compare(GROUPS["gqa"], slots, turns, seed)
    compare(GROUPS["gqa"], slots, turns, seed, library)


@pytest.mark.parametrize(
    ("past", "new", "by_products"),
    [(past, 1, by) for past in (9, 40, 41, 42, 43) for by in (False, True)]
    + [(0, 30, False), (40, 30, False), (0, 5, False)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_with_full_heads_it_is_both_operators(
    past: int, new: int, by_products: bool, dtype: Any, library: Path
) -> None:
    heads, full = GROUPS["gqa"], HeadGroup(3, 1, DIM, DIM**-0.5)
    draw = np.random.default_rng(3)
    cache = draw.standard_normal((2, 1, heads.kv_heads, SLOTS.capacity, DIM)).astype(dtype)
    bounded = step(draw, heads, SLOTS, past, new) | {"past_key": cache[0], "past_value": cache[1]} | rotary(90)
    bounded = {name: bounded[name] for name in INPUTS}
    whole = full_feeds_of(full, past, new, 90, by_products=by_products, seed=5, blocks=6, cache_dtype=dtype)
    states = {name: np.concatenate([whole[name], bounded[name]], axis=-1) for name in ("query", "key", "value")}
    flags = {
        "steps": bounded["steps"] & (not by_products),
        "appends_by_products": bounded["appends"] & by_products,
    }
    caches = {f"full_{name}": whole[name] for name in ("past_key", "past_value")}
    feeds = whole | caches | bounded | states | flags
    feeds = {name: feeds[name] for name in inputs_of(Overload(with_full=True))}

    node = task_kv_node("attention", INPUTS, OUTPUTS, heads=heads, slots=SLOTS)
    others = oracle_of(one_node(node, bounded, results(OUTPUTS, dtype))).run(None, bounded)
    node = full_kv_node("attention", FULL_KV_INPUTS, OUTPUTS, heads=full)
    firsts = oracle_of(one_node(node, whole, results(OUTPUTS, dtype))).run(None, whole)
    expected = [np.concatenate([firsts[0], others[0]], axis=-1), *others[1:], *firsts[1:]]
    for from_c in (None, library):
        for found in forms_of(heads, SLOTS, feeds, full, from_c)(feeds):
            assert_equal(found, expected, [int(bounded["slots_in_use"][0]), past + new])


@settings(max_examples=60, deadline=None)
@given(slots=ANY_SLOTS, past=st.integers(0, 200), new=st.integers(1, 200))
def test_the_cursor_counts_as_the_slots_do(slots: Slots, past: int, new: int) -> None:
    feeds = {"input_ids": np.ones((1, new), np.int64), "attention_mask": np.ones((1, past + new), np.int64)}
    kinds = (TensorProto.INT64,) * 2 + (TensorProto.INT32,) * 2 + (TensorProto.BOOL,)
    node = task_kv_cursor_node(TASK_KV_OUTPUTS, capacity=slots.capacity, stride=slots.stride)
    session = runtime_of(one_node(node, feeds, dict(zip(TASK_KV_OUTPUTS, kinds, strict=True))))
    positions, held, used, last, appends = session.run(None, feeds)
    assert positions.tolist() == [list(range(past, past + new))]
    assert (held.tolist(), used.tolist()) == ([slots.in_use(past)], [slots.in_use(past + new)])
    assert last.tolist() == [slots.in_use(past + new) - 1]
    assert appends.tolist() == [slots.in_use(past) + new == slots.in_use(past + new)]


@given(slots=ANY_SLOTS)
def test_slots_in_use_follow_from_appending_and_dropping(slots: Slots) -> None:
    held = 0
    for seen in range(1, 4 * slots.capacity):
        if held == slots.capacity:
            held -= slots.stride
        held += 1
        assert slots.in_use(seen) == held
        assert held >= min(seen, slots.fixed + slots.recent)


def test_the_definitions_are_valid() -> None:
    feeds = step(np.random.default_rng(0), GROUPS["gqa"], SLOTS, 0, 1) | rotary(9)
    feeds |= dict.fromkeys(("past_key", "past_value"), np.zeros((1, 2, SLOTS.capacity, DIM), np.float32))
    model = one_node(task_kv_node("a", INPUTS, OUTPUTS, heads=GROUPS["gqa"], slots=SLOTS), feeds, results(OUTPUTS))
    for output in model.graph.output:
        output.type.tensor_type.shape.SetInParent()  # the checker wants one
    onnx.checker.check_model(model)
