"""The operator ``ai.thinkkv::TaskKVAttention``, version 1: a bounded cache for some heads of a layer.

It is a model-local function: the text below is its definition, and any ONNX Runtime that knows its parts runs it. An
engine may instead recognise the operator by name; docs/onnx-operator.md explains it node by node, and ``reference.py``
computes the same in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import onnx
import onnx.parser

from thinkkv.export.onnx.slots import Slots

DOMAIN = "ai.thinkkv"
NAME = "TaskKVAttention"
VERSION = 1
OPSETS = {"": 24, "com.microsoft": 1}
"""Opsets of the body: 24 brings TensorScatter, which writes in place where past and present share a buffer."""

INPUTS = (
    "query",
    "key",
    "value",
    "past_key",
    "past_value",
    "position_ids",
    "last_slot",
    "slots_in_use",
    "write_slot",
    "cos_cache",
    "sin_cache",
)


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that are cached alike.

    Args:
        query_heads, kv_heads, head_dim: counts and size.
        scale: softmax scale.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    scale: float


# Decode writes one slot and attends to the slots as they lie: attention does not mind their order, and the keys carry
# their positions. GroupQueryAttention without new keys attends to a cache that it does not write; the empty tensor for
# them is made from the rotary table because that is constant, and so costs nothing at run time.
_DECODE = """
  d_one = Constant <value_ints = [1]> ()
  d_rest = Constant <value_ints = [-1]> ()
  d_zero = Constant <value_ints = [0]> ()
  d_heads_0 = Constant <value_int: int = @kv_num_heads> ()
  d_heads = Unsqueeze (d_heads_0, d_zero)
  d_shape = Concat <axis = 0> (d_one, d_heads, d_one, d_rest)
  d_rotated = com.microsoft.RotaryEmbedding (key, position_ids, cos_cache, sin_cache)
  d_new_key = Reshape (d_rotated, d_shape)
  d_new_value = Reshape (value, d_shape)
  d_key = TensorScatter <axis = 2> (past_key, d_new_key, write_slot)
  d_value = TensorScatter <axis = 2> (past_value, d_new_value, write_slot)
  d_no_angles = Slice (cos_cache, d_zero, d_zero, d_zero)
  d_half = Shape <start = 1, end = 2> (cos_cache)
  d_dim = Add (d_half, d_half)
  d_width = Mul (d_dim, d_heads)
  d_nothing_shape = Concat <axis = 0> (d_one, d_zero, d_width)
  d_nothing = Reshape <allowzero = 1> (d_no_angles, d_nothing_shape)
  d_output = com.microsoft.GroupQueryAttention
    <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1>
    (query, d_nothing, d_nothing, d_key, d_value, last_slot, slots_in_use, cos_cache, sin_cache, position_ids)
"""

# A prompt attends to what is held, oldest first, and to itself; then it is compacted.
_PROMPT = """
  p_zero = Constant <value_int = 0> ()
  p_one = Constant <value_int = 1> ()
  p_first = Constant <value_ints = [0]> ()
  p_sinks = Constant <value_int: int = @sinks> ()
  p_middle = Constant <value_int: int = @middle> ()
  p_fixed = Add (p_sinks, p_middle)
  p_new = Size (position_ids)
  p_all = Constant <value_ints = [-1]> ()
  p_positions = Reshape (position_ids, p_all)
  p_past = Gather <axis = 0> (p_positions, p_zero)
  p_seen = Add (p_past, p_new)
  p_capacity_1 = Shape <start = 2, end = 3> (past_key)
  p_capacity = Squeeze (p_capacity_1, p_first)
  p_room = Sub (p_capacity, p_fixed)
  p_ring = Max (p_room, p_one)
  p_held = Min (p_past, p_capacity)
  p_entry = Range (p_zero, p_held, p_one)
  p_from_fixed = Sub (p_entry, p_fixed)
  p_oldest = Sub (p_past, p_fixed)
  p_turn = Add (p_oldest, p_from_fixed)
  p_turned = Mod (p_turn, p_ring)
  p_slot = Add (p_turned, p_fixed)
  p_is_fixed = Less (p_entry, p_fixed)
  p_never_full = LessOrEqual (p_past, p_capacity)
  p_in_place = Or (p_is_fixed, p_never_full)
  p_order = Where (p_in_place, p_entry, p_slot)
  p_old_key = Gather <axis = 2> (past_key, p_order)
  p_old_value = Gather <axis = 2> (past_value, p_order)
  p_entries = Add (p_held, p_new)
  p_last = Sub (p_entries, p_one)
  p_last_32 = Cast <to = 6> (p_last)
  p_last_slot = Unsqueeze (p_last_32, p_first)
  p_entries_32 = Cast <to = 6> (p_entries)
  p_output, p_keys, p_values = com.microsoft.GroupQueryAttention
    <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1>
    (query, key, value, p_old_key, p_old_value, p_last_slot, p_entries_32, cos_cache, sin_cache, position_ids)
  p_fits = LessOrEqual (p_entries, p_capacity)
  p_key, p_value = If (p_fits)
    <then_branch = keep_all () => (k_key, k_value) {%KEEP_ALL%}, else_branch = select () => (s_key, s_value) {%SELECT%}>
"""

_KEEP_ALL = """
  k_start = Unsqueeze (p_entries, p_first)
  k_axis = Constant <value_ints = [2]> ()
  k_free_key = Slice (past_key, k_start, p_capacity_1, k_axis)
  k_free_value = Slice (past_value, k_start, p_capacity_1, k_axis)
  k_key = Concat <axis = 2> (p_keys, k_free_key)
  k_value = Concat <axis = 2> (p_values, k_free_value)
"""

_SELECT = """
  s_one_1 = Constant <value_ints = [1]> ()
  s_all = Constant <value_ints = [-1]> ()
  s_heads_0 = Constant <value_int: int = @kv_num_heads> ()
  s_heads = Unsqueeze (s_heads_0, p_first)
  s_query_heads_0 = Constant <value_int: int = @num_heads> ()
  s_query_heads = Unsqueeze (s_query_heads_0, p_first)
  s_longest = Constant <value_int: int = @observation_window> ()
  s_window = Min (s_longest, p_new)
  s_window_1 = Unsqueeze (s_window, p_first)
  s_start = Sub (p_new, s_window)
  s_start_1 = Unsqueeze (s_start, p_first)
  s_new_1 = Unsqueeze (p_new, p_first)
  s_queries = Slice (query, s_start_1, s_new_1, s_one_1)
  s_positions = Slice (position_ids, s_start_1, s_new_1, s_one_1)
  s_rotated = com.microsoft.RotaryEmbedding (s_queries, s_positions, cos_cache, sin_cache)
  s_by_head_shape = Concat <axis = 0> (s_one_1, s_window_1, s_query_heads, s_all)
  s_by_head = Reshape (s_rotated, s_by_head_shape)
  s_head_first = Transpose <perm = [0, 2, 1, 3]> (s_by_head)
  s_dim_1 = Shape <start = 3, end = 4> (past_key)
  s_grouped_shape = Concat <axis = 0> (s_heads, s_all, s_dim_1)
  s_grouped = Reshape (s_head_first, s_grouped_shape)
  s_grouped_32 = Cast <to = 1> (s_grouped)
  s_scale = Constant <value_float: float = @scale> ()
  s_scaled = Mul (s_grouped_32, s_scale)
  s_flat_keys_shape = Concat <axis = 0> (s_all, s_dim_1)
  s_flat_keys = Reshape (p_keys, s_flat_keys_shape)
  s_flat_values = Reshape (p_values, s_flat_keys_shape)
  s_keys = Squeeze (p_keys, p_first)
  s_keys_32 = Cast <to = 1> (s_keys)
  s_keys_t = Transpose <perm = [0, 2, 1]> (s_keys_32)
  s_grouped_logits = MatMul (s_scaled, s_keys_t)
  s_entries_1 = Unsqueeze (p_entries, p_first)
  s_logits_shape = Concat <axis = 0> (s_all, s_window_1, s_entries_1)
  s_logits = Reshape (s_grouped_logits, s_logits_shape)
  s_entry = Range (p_zero, p_entries, p_one)
  s_own = Sub (p_entries, s_window)
  s_own_entry = Range (s_own, p_entries, p_one)
  s_own_column = Unsqueeze (s_own_entry, s_one_1)
  s_future = Greater (s_entry, s_own_column)
  s_never = Constant <value_float = -3.0e38> ()
  s_masked = Where (s_future, s_never, s_logits)
  s_weights = Softmax <axis = -1> (s_masked)
  s_column = ReduceMean <keepdims = 0> (s_weights, s_one_1)
  s_per_group_shape = Concat <axis = 0> (s_heads, s_all, s_entries_1)
  s_per_group = Reshape (s_column, s_per_group_shape)
  s_scores = ReduceMean <keepdims = 0> (s_per_group, s_one_1)
  s_recent = Sub (p_entries, p_ring)
  s_recent_1 = Unsqueeze (s_recent, p_first)
  s_sinks_1 = Unsqueeze (p_sinks, p_first)
  s_between = Slice (s_scores, s_sinks_1, s_recent_1, s_one_1)
  s_pooling = Constant <value_ints: ints = @pooling> ()
  s_two = Constant <value_ints = [2]> ()
  s_margin = Div (s_pooling, s_two)
  s_margins = Concat <axis = 0> (s_margin, s_margin)
  s_padded = Pad (s_between, s_margins, , s_one_1)
  s_padded_3 = Unsqueeze (s_padded, p_first)
  s_pooled_3 = AveragePool <kernel_shape: ints = @pooling> (s_padded_3)
  s_pooled = Squeeze (s_pooled_3, p_first)
  s_middle_1 = Unsqueeze (p_middle, p_first)
  s_best_scores, s_best = TopK <axis = -1, largest = 1, sorted = 0> (s_pooled, s_middle_1)
  s_ascending, s_places = TopK <axis = -1, largest = 0, sorted = 1> (s_best, s_middle_1)
  s_middle = Add (s_ascending, p_sinks)
  s_last_position = Sub (p_seen, p_one)
  s_newest = Sub (s_last_position, p_fixed)
  s_ring_slot = Range (p_zero, p_ring, p_one)
  s_behind = Sub (s_newest, s_ring_slot)
  s_age = Mod (s_behind, p_ring)
  s_ring = Sub (p_last, s_age)
  s_first = Range (p_zero, p_sinks, p_one)
  s_ring_rows_shape = Concat <axis = 0> (s_heads, s_one_1)
  s_first_rows = Expand (s_first, s_ring_rows_shape)
  s_ring_rows = Expand (s_ring, s_ring_rows_shape)
  s_chosen = Concat <axis = 1> (s_first_rows, s_middle, s_ring_rows)
  s_head = Range (p_zero, s_heads_0, p_one)
  s_offset = Mul (s_head, p_entries)
  s_offset_column = Unsqueeze (s_offset, s_one_1)
  s_index = Add (s_chosen, s_offset_column)
  s_kept_keys = Gather <axis = 0> (s_flat_keys, s_index)
  s_kept_values = Gather <axis = 0> (s_flat_values, s_index)
  s_key = Unsqueeze (s_kept_keys, p_first)
  s_value = Unsqueeze (s_kept_values, p_first)
"""

_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24, "com.microsoft": 1]>
TaskKVAttention <num_heads, kv_num_heads, scale, sinks, middle, observation_window, pooling> (%INPUTS%)
  => (output, present_key, present_value)
{
  c_one = Constant <value_int = 1> ()
  c_new = Size (position_ids)
  c_is_decode = Equal (c_new, c_one)
  output, present_key, present_value = If (c_is_decode)
    <then_branch = decode () => (d_output, d_key, d_value) {%DECODE%},
     else_branch = prompt () => (p_output, p_key, p_value) {%PROMPT%}>
}
"""


@cache
def task_kv_attention() -> onnx.FunctionProto:
    """The operator's definition."""
    text = _TEXT.replace("%INPUTS%", ", ".join(INPUTS)).replace("%DECODE%", _DECODE).replace("%PROMPT%", _PROMPT)
    text = text.replace("%KEEP_ALL%", _KEEP_ALL).replace("%SELECT%", _SELECT)
    return onnx.parser.parse_function(text)


def task_kv_node(
    name: str, inputs: Sequence[str], outputs: Sequence[str], *, heads: HeadGroup, slots: Slots
) -> onnx.NodeProto:
    """One use of the operator.

    Args:
        name: of the node.
        inputs, outputs: value names, in the operator's order.
        heads: the heads that it attends.
        slots: what they keep.
    """
    return onnx.helper.make_node(
        NAME,
        inputs,
        outputs,
        name=name,
        domain=DOMAIN,
        num_heads=heads.query_heads,
        kv_num_heads=heads.kv_heads,
        scale=heads.scale,
        sinks=slots.sinks,
        middle=slots.middle,
        observation_window=slots.observation_window,
        pooling=[slots.pooling],
    )
