"""The function ``ai.thinkkv::TaskKVCursor``, version 1: where a call stands, computed once for all layers."""

from __future__ import annotations

from functools import cache

import onnx
import onnx.parser

from thinkkv.export.onnx.slots import Slots

NAME = "TaskKVCursor"
OUTPUTS = ("position_ids", "last_slot", "slots_in_use", "write_slot")

_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24]>
TaskKVCursor <fixed> (input_ids, attention_mask, past_key) => (position_ids, last_slot, slots_in_use, write_slot)
{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_int = 1> ()
  new_1 = Shape <start = 1, end = 2> (input_ids)
  total_1 = Shape <start = 1, end = 2> (attention_mask)
  capacity_1 = Shape <start = 2, end = 3> (past_key)
  new = Squeeze (new_1, zero)
  total = Squeeze (total_1, zero)
  capacity = Squeeze (capacity_1, zero)
  past = Sub (total, new)
  positions = Range (past, total, one)
  position_ids = Unsqueeze (positions, zero)
  in_use = Min (total, capacity)
  slots_in_use = Cast <to = 6> (in_use)
  last = Sub (in_use, one)
  last_1 = Unsqueeze (last, zero)
  last_slot = Cast <to = 6> (last_1)
  position = Sub (total, one)
  fixed = Constant <value_int: int = @fixed> ()
  room = Sub (capacity, fixed)
  ring = Max (room, one)
  from_fixed = Sub (position, fixed)
  turn = Mod (from_fixed, ring)
  turned = Add (turn, fixed)
  is_free = Less (position, capacity)
  slot = Where (is_free, position, turned)
  write_slot = Unsqueeze (slot, zero)
}
"""


@cache
def task_kv_cursor() -> onnx.FunctionProto:
    """The function's definition."""
    return onnx.parser.parse_function(_TEXT)


def cursor_node(domain: str, past_key: str, outputs: tuple[str, ...], slots: Slots) -> onnx.NodeProto:
    """Its one use in a graph.

    Args:
        domain: of the function.
        past_key: any bounded cache of the graph, for its capacity.
        outputs: names for ``OUTPUTS``.
        slots: what the bounded caches keep.
    """
    inputs = ("input_ids", "attention_mask", past_key)
    return onnx.helper.make_node(NAME, inputs, outputs, name="/thinkkv/cursor", domain=domain, fixed=slots.fixed)
