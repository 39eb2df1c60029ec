"""``ai.thinkkv::TaskKVCursor``, ``FullKVCursor``, ``StepCursor``, version 1: where a call stands, for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx
import onnx.parser

from thinkkv.export.onnx.domain import DOMAIN
from thinkkv.export.onnx.slots import MOST_BLOCKS

TASK_KV = "TaskKVCursor"
TASK_KV_OUTPUTS = ("position_ids", "held", "slots_in_use", "last_slot", "appends")
FULL_KV = "FullKVCursor"
FULL_KV_OUTPUTS = ("write_slot", "mask", "blocks", "by_products", "appends_by_products", "stock")
STEP = "StepCursor"
LONG = 1024
"""Tokens from which on full heads may be attended to by matrix products; with fewer these cost more than they save."""

_TASK_KV_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24]>
TaskKVCursor <capacity, stride> (input_ids, attention_mask)
  => (position_ids, held, slots_in_use, last_slot, appends)
{
  zero = Constant <value_ints = [0]> ()
  one = Constant <value_int = 1> ()
  one_32 = Cast <to = 6> (one)
  stride = Constant <value_int: int = @stride> ()
  capacity = Constant <value_int: int = @capacity> ()
  below = Sub (capacity, stride)
  unmoved = Add (below, one)
  new_1 = Shape <start = 1, end = 2> (input_ids)
  total_1 = Shape <start = 1, end = 2> (attention_mask)
  past_1 = Sub (total_1, new_1)
  total = Squeeze (total_1, zero)
  past = Squeeze (past_1, zero)
  positions = Range (past, total, one)
  position_ids = Unsqueeze (positions, zero)
  seen = Concat <axis = 0> (past_1, total_1)
  over = Sub (seen, unmoved)
  beyond = Max (over, zero)
  moves = Div (beyond, stride)
  gone = Mul (moves, stride)
  both = Sub (seen, gone)
  held, in_use = Split <num_outputs = 2> (both)
  moves_past, moves_total = Split <num_outputs = 2> (moves)
  appends = Equal (moves_past, moves_total)
  slots_in_use = Cast <to = 6> (in_use)
  last_slot = Sub (slots_in_use, one_32)
}
"""

_FULL_KV_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24]>
FullKVCursor <long> (input_ids, attention_mask, past_key, appends)
  => (write_slot, mask, blocks, by_products, appends_by_products, stock)
{
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  first = Constant <value_ints = [0]> ()
  new = Size (input_ids)
  total = Size (attention_mask)
  last = Sub (total, one)
  write_slot = Unsqueeze (last, first)
  length_1 = Shape <start = 2, end = 3> (past_key)
  length = Squeeze (length_1, first)
  slot = Range (zero, length, one)
  seen = Less (slot, total)
  nothing = Constant <value_float = 0.0> ()
  never = Constant <value_float = -3.0e38> ()
  mask = Where (seen, nothing, never)
  counts = Constant <value_ints = [%COUNTS%]> ()
  remainders = Mod (length_1, counts)
  divides = Equal (remainders, zero)
  divisors = Where (divides, counts, one)
  blocks = ReduceMax <keepdims = 1> (divisors)
  twice = Add (total, total)
  is_half = GreaterOrEqual (twice, length)
  threshold = Constant <value_int: int = @long> ()
  is_long = GreaterOrEqual (total, threshold)
  is_decode = Equal (new, one)
  is_long_decode = And (is_long, is_decode)
  by_products = And (is_long_decode, is_half)
  by_attention = Not (by_products)
  stock = And (appends, by_attention)
  appends_by_products = And (appends, by_products)
}
"""


# In C (``thinkkv.kernels.task_kv_step``) it is one new token alone: TaskKVStep there needs no stock nodes.
_STEP_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24]>
StepCursor (input_ids, stock) => (steps)
{
  one = Constant <value_int = 1> ()
  new = Size (input_ids)
  is_decode = Equal (new, one)
  steps = And (is_decode, stock)
}
"""


@cache
def task_kv_cursor() -> onnx.FunctionProto:
    """The definition of TaskKVCursor."""
    return onnx.parser.parse_function(_TASK_KV_TEXT)


@cache
def full_kv_cursor() -> onnx.FunctionProto:
    """The definition of FullKVCursor."""
    counts = ", ".join(map(str, range(1, MOST_BLOCKS + 1)))
    return onnx.parser.parse_function(_FULL_KV_TEXT.replace("%COUNTS%", counts))


@cache
def step_cursor() -> onnx.FunctionProto:
    """The definition of StepCursor."""
    return onnx.parser.parse_function(_STEP_TEXT)


def task_kv_cursor_node(outputs: Sequence[str], *, capacity: int, stride: int) -> onnx.NodeProto:
    """The one use of TaskKVCursor in a graph.

    Args:
        outputs: names for ``TASK_KV_OUTPUTS``.
        capacity: slots of the bounded caches; a runtime may allocate fewer if the whole text fits them.
        stride: recent tokens that go at once.
    """
    return onnx.helper.make_node(
        TASK_KV,
        ("input_ids", "attention_mask"),
        outputs,
        name="/thinkkv/bounded",
        domain=DOMAIN,
        capacity=capacity,
        stride=stride,
    )


def full_kv_cursor_node(past_key: str, appends: str, outputs: Sequence[str]) -> onnx.NodeProto:
    """The one use of FullKVCursor in a graph.

    Args:
        past_key: any full cache of the graph, for its length.
        appends: that output of TaskKVCursor.
        outputs: names for ``FULL_KV_OUTPUTS``.
    """
    inputs = ("input_ids", "attention_mask", past_key, appends)
    return onnx.helper.make_node(FULL_KV, inputs, outputs, name="/thinkkv/full", domain=DOMAIN, long=LONG)


def step_cursor_node(stock: str, output: str) -> onnx.NodeProto:
    """A use of StepCursor.

    Args:
        stock: whether stock attention nodes serve this call.
        output: name of what says so of TaskKVStep.
    """
    return onnx.helper.make_node(STEP, ("input_ids", stock), (output,), name=output, domain=DOMAIN)
