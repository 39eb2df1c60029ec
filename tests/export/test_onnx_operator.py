"""The operator's definition, run by ONNX Runtime, computes what its numpy reference computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from thinkkv.export.onnx.operator import DOMAIN, INPUTS, OPSETS, VERSION, HeadGroup, task_kv_attention, task_kv_node
from thinkkv.export.onnx.reference import TaskKVAttention
from thinkkv.export.onnx.slots import Slots

DIM = 16
SLOTS = Slots(sinks=3, middle=7, recent=12, observation_window=8, pooling=5)
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
    "turn before the ring is full": [10, *[1] * 13, 4, *[1] * 20, 7, 1],
}


def model_of(group: HeadGroup, slots: Slots) -> onnx.ModelProto:
    types = dict.fromkeys(INPUTS, TensorProto.FLOAT)
    types |= dict.fromkeys(("position_ids", "write_slot"), TensorProto.INT64)
    types |= dict.fromkeys(("last_slot", "slots_in_use"), TensorProto.INT32)
    ranks = dict.fromkeys(INPUTS, 3) | dict.fromkeys(("past_key", "past_value"), 4)
    ranks |= dict.fromkeys(("cos_cache", "sin_cache", "position_ids"), 2)
    ranks |= {"last_slot": 1, "write_slot": 1, "slots_in_use": 0}
    inputs = [helper.make_tensor_value_info(name, types[name], [None] * ranks[name]) for name in INPUTS]
    names = ("output", "present_key", "present_value")
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * (3 + (name != "output"))) for name in names
    ]
    node = task_kv_node("attention", INPUTS, names, heads=group, slots=slots)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (*OPSETS.items(), (DOMAIN, VERSION))]
    graph = helper.make_graph([node], "one_node", inputs, outputs)
    return helper.make_model(graph, functions=[task_kv_attention()], opset_imports=opsets, ir_version=11)


def step(draw: np.random.Generator, group: HeadGroup, slots: Slots, past: int, new: int) -> dict[str, Any]:
    def states(heads: int) -> Any:
        return draw.standard_normal((1, new, heads * group.head_dim), dtype=np.float32)

    seen = past + new
    used = min(seen, slots.capacity)
    return {
        "query": 3 * states(group.query_heads),
        "key": states(group.kv_heads),
        "value": states(group.kv_heads),
        "position_ids": np.arange(past, seen)[None],
        "last_slot": np.array([used - 1], np.int32),
        "slots_in_use": np.array(used, np.int32),
        "write_slot": np.array([slots.slot_of(seen - 1)]),
    }


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("group", GROUPS)
def test_the_definition_equals_the_reference(group: str, turns: str) -> None:
    heads, draw = GROUPS[group], np.random.default_rng(7)
    model = model_of(heads, SLOTS)
    runtime = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.functions[:]
    oracle = ReferenceEvaluator(bare, new_ops=[TaskKVAttention])

    angle = np.arange(400)[:, None] / 100 ** (np.arange(DIM // 2) / (DIM // 2))
    rotary = {"cos_cache": np.cos(angle).astype(np.float32), "sin_cache": np.sin(angle).astype(np.float32)}
    # What was never written is poison: reading it would show.
    past_key = past_value = np.full((1, heads.kv_heads, SLOTS.capacity, DIM), np.nan, np.float32)
    past = 0
    for new in TURNS[turns]:
        feeds = step(draw, heads, SLOTS, past, new) | rotary | {"past_key": past_key, "past_value": past_value}
        found, expected = runtime.run(None, feeds), oracle.run(None, feeds)
        for mine, its in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-4, atol=2e-5)
        past_key, past_value, past = found[1], found[2], past + new


def test_the_definition_is_valid() -> None:
    onnx.checker.check_model(model_of(GROUPS["gqa"], SLOTS))
