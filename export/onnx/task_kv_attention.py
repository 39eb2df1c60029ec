"""The operator ``ai.thinkkv::TaskKVAttention``, version 1: a bounded cache for some heads of a layer.

It is a model-local function: the text below is its definition, and any ONNX Runtime that knows its parts runs it. An
engine may instead recognise the operator by name; docs/onnx-operator.md explains it node by node, and ``reference.py``
computes the same in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx

from thinkkv.export.onnx import task_kv_step as step
from thinkkv.export.onnx.cursor import FULL_KV_OUTPUTS, TASK_KV_OUTPUTS
from thinkkv.export.onnx.definition import definition
from thinkkv.export.onnx.domain import DOMAIN, HeadGroup, Overload
from thinkkv.export.onnx.full_kv_attention import INPUTS as FULL_KV_INPUTS
from thinkkv.export.onnx.full_kv_attention import products
from thinkkv.export.onnx.head_groups import apart, bounded_states
from thinkkv.export.onnx.slots import Slots

NAME = "TaskKVAttention"
INPUTS = ("query", "key", "value", "past_key", "past_value", *TASK_KV_OUTPUTS, "steps", "cos_cache", "sin_cache")
FULL_KV_FLAGS = FULL_KV_OUTPUTS[:-1]
"""What it reads of FullKVCursor; what is left serves StepCursor."""
FULL_INPUTS = ("full_past_key", "full_past_value", "seqlens_k", "total_sequence_length", *FULL_KV_FLAGS)
"""Behind them where the layer has full heads."""

# A new token that finds no room: the oldest recent ones go, the others move up. GroupQueryAttention without new keys
# attends to a cache that it does not write; the empty tensor for them is made from the rotary table because that is
# constant, and so costs nothing at run time.
_SHIFT = """
  m_one = Constant <value_ints = [1]> ()
  m_rest = Constant <value_ints = [-1]> ()
  m_zero = Constant <value_ints = [0]> ()
  m_axis = Constant <value_ints = [2]> ()
  m_heads_0 = Constant <value_int: int = @kv_num_heads> ()
  m_heads = Unsqueeze (m_heads_0, m_zero)
  m_sinks = Constant <value_int: int = @sinks> ()
  m_middle = Constant <value_int: int = @middle> ()
  m_stride = Constant <value_int: int = @stride> ()
  m_fixed_0 = Add (m_sinks, m_middle)
  m_fixed = Unsqueeze (m_fixed_0, m_zero)
  m_first_0 = Add (m_fixed_0, m_stride)
  m_first = Unsqueeze (m_first_0, m_zero)
  m_capacity = Shape <start = 2, end = 3> (past_key)
  m_shape = Concat <axis = 0> (m_one, m_heads, m_one, m_rest)
  m_rotated = com.microsoft.RotaryEmbedding (%KEY%, position_ids, cos_cache, sin_cache)
  m_stored_key = CastLike (m_rotated, past_key)
  m_stored_value = CastLike (%VALUE%, past_value)
  m_new_key = Reshape (m_stored_key, m_shape)
  m_new_value = Reshape (m_stored_value, m_shape)
  m_old_keys = Slice (past_key, m_first, m_capacity, m_axis)
  m_old_values = Slice (past_value, m_first, m_capacity, m_axis)
  m_keys = Concat <axis = 2> (m_old_keys, m_new_key)
  m_values = Concat <axis = 2> (m_old_values, m_new_value)
  m_key = TensorScatter <axis = 2> (past_key, m_keys, m_fixed)
  m_value = TensorScatter <axis = 2> (past_value, m_values, m_fixed)
  m_no_angles = Slice (cos_cache, m_zero, m_zero, m_zero)
  m_half = Shape <start = 1, end = 2> (cos_cache)
  m_dim = Add (m_half, m_half)
  m_width = Mul (m_dim, m_heads)
  m_nothing_shape = Concat <axis = 0> (m_one, m_zero, m_width)
  m_nothing = Reshape <allowzero = 1> (m_no_angles, m_nothing_shape)
  m_output = com.microsoft.GroupQueryAttention
    <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1>
    (%QUERY%, m_nothing, m_nothing, m_key, m_value, last_slot, slots_in_use, cos_cache, sin_cache, position_ids)
"""

# A prompt that does not fit attends to what is held and to itself; then it is compacted.
_COMPACT = """
  p_zero = Constant <value_int = 0> ()
  p_one = Constant <value_int = 1> ()
  p_first = Constant <value_ints = [0]> ()
  p_axis = Constant <value_ints = [2]> ()
  p_old_key = Slice (past_key, p_first, held, p_axis)
  p_old_value = Slice (past_value, p_first, held, p_axis)
  p_held = Squeeze (held, p_first)
  p_entries = Add (p_held, new)
  p_last = Sub (p_entries, p_one)
  p_last_32 = Cast <to = 6> (p_last)
  p_last_slot = Unsqueeze (p_last_32, p_first)
  p_entries_32 = Cast <to = 6> (p_entries)
  p_output, p_keys, p_values = com.microsoft.GroupQueryAttention
    <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1>
    (%STATES%, p_old_key, p_old_value, p_last_slot, p_entries_32, cos_cache, sin_cache, position_ids)
  s_one_1 = Constant <value_ints = [1]> ()
  s_all = Constant <value_ints = [-1]> ()
  s_heads_0 = Constant <value_int: int = @kv_num_heads> ()
  s_heads = Unsqueeze (s_heads_0, p_first)
  s_query_heads_0 = Constant <value_int: int = @num_heads> ()
  s_query_heads = Unsqueeze (s_query_heads_0, p_first)
  s_longest = Constant <value_int: int = @observation_window> ()
  s_window = Min (s_longest, new)
  s_window_1 = Unsqueeze (s_window, p_first)
  s_start = Sub (new, s_window)
  s_start_1 = Unsqueeze (s_start, p_first)
  s_new_1 = Unsqueeze (new, p_first)
  s_queries = Slice (%QUERY%, s_start_1, s_new_1, s_one_1)
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
  s_sinks = Constant <value_int: int = @sinks> ()
  s_middle_count = Constant <value_int: int = @middle> ()
  s_fixed = Add (s_sinks, s_middle_count)
  s_in_use_1 = Cast <to = 7> (slots_in_use)
  s_in_use = Squeeze (s_in_use_1, p_first)
  s_recent_count = Sub (s_in_use, s_fixed)
  s_recent = Sub (p_entries, s_recent_count)
  s_recent_1 = Unsqueeze (s_recent, p_first)
  s_sinks_1 = Unsqueeze (s_sinks, p_first)
  s_between = Slice (s_scores, s_sinks_1, s_recent_1, s_one_1)
  s_pooling = Constant <value_ints: ints = @pooling> ()
  s_two = Constant <value_ints = [2]> ()
  s_margin = Div (s_pooling, s_two)
  s_margins = Concat <axis = 0> (s_margin, s_margin)
  s_padded = Pad (s_between, s_margins, , s_one_1)
  s_padded_3 = Unsqueeze (s_padded, p_first)
  s_pooled_3 = AveragePool <kernel_shape: ints = @pooling> (s_padded_3)
  s_pooled = Squeeze (s_pooled_3, p_first)
  s_middle_1 = Unsqueeze (s_middle_count, p_first)
  s_best_scores, s_best = TopK <axis = -1, largest = 1, sorted = 0> (s_pooled, s_middle_1)
  s_ascending, s_places = TopK <axis = -1, largest = 0, sorted = 1> (s_best, s_middle_1)
  s_middle = Add (s_ascending, s_sinks)
  s_first = Range (p_zero, s_sinks, p_one)
  s_newest = Range (s_recent, p_entries, p_one)
  s_capacity_1 = Shape <start = 2, end = 3> (past_key)
  s_spare_1 = Sub (s_capacity_1, s_in_use_1)
  s_spare = Expand (p_zero, s_spare_1)
  s_rows_shape = Concat <axis = 0> (s_heads, s_one_1)
  s_behind = Concat <axis = 0> (s_newest, s_spare)
  s_first_rows = Expand (s_first, s_rows_shape)
  s_behind_rows = Expand (s_behind, s_rows_shape)
  s_chosen = Concat <axis = 1> (s_first_rows, s_middle, s_behind_rows)
  s_head = Range (p_zero, s_heads_0, p_one)
  s_offset = Mul (s_head, p_entries)
  s_offset_column = Unsqueeze (s_offset, s_one_1)
  s_index = Add (s_chosen, s_offset_column)
  s_kept_keys = Gather <axis = 0> (s_flat_keys, s_index)
  s_kept_values = Gather <axis = 0> (s_flat_values, s_index)
  p_key = Unsqueeze (s_kept_keys, p_first)
  p_value = Unsqueeze (s_kept_values, p_first)
"""

# Steps come first: nothing else is worth as much.
_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24, "com.microsoft": 1, "ai.thinkkv": 1]>
TaskKVAttention <%ATTRIBUTES%> (%INPUTS%) => (output, present_key, present_value)
{
  output, present_key, present_value = If (steps)
    <then_branch = step () => (t_output, t_key, t_value) {
       t_output, t_key, t_value = %STEP%
     },
     else_branch = others () => (o_output, o_key, o_value) {
       o_output, o_key, o_value = If (appends)
         <then_branch = append () => (a_output, a_key, a_value) {%APPEND%},
          else_branch = make_room () => (r_output, r_key, r_value) {%APART%
            new = Size (position_ids)
            r_one = Constant <value_int = 1> ()
            r_is_decode = Equal (new, r_one)
            r_output, r_key, r_value = If (r_is_decode)
              <then_branch = shift () => (m_output, m_key, m_value) {%SHIFT%},
               else_branch = compact () => (p_output, p_key, p_value) {%COMPACT%}>
          }>
     }>
}
"""

# The layer's full heads besides: each branch costs time in every step, so both groups share those that most steps take.
_WITH_FULL_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24, "com.microsoft": 1, "ai.thinkkv": 1]>
TaskKVAttention <%ATTRIBUTES%> (%INPUTS%)
  => (output, present_key, present_value, full_present_key, full_present_value)
{
  output, present_key, present_value, full_present_key, full_present_value = If (steps)
    <then_branch = step () => (t_output, t_key, t_value, t_full_key, t_full_value) {
       t_output, t_key, t_value, t_full_key, t_full_value = %STEP%
     },
     else_branch = others () => (o_output, o_key, o_value, o_full_key, o_full_value) {%APART%
       full_output, o_full_key, o_full_value, bounded_output, o_key, o_value = If (appends_by_products)
         <then_branch = long () => (p_output, p_key, p_value, a_output, a_key, a_value) {
            %PRODUCTS%
            %APPEND%
          },
          else_branch = each () => (e_full_output, e_full_key, e_full_value, e_output, e_key, e_value) {
            e_full_output, e_full_key, e_full_value = ai.thinkkv.FullKVAttention
              <num_heads: int = @full_num_heads, kv_num_heads: int = @full_kv_num_heads, scale: float = @scale>
              (full_query, full_key, full_value, full_past_key, full_past_value, %FULL_CURSOR%)
            e_output, e_key, e_value = ai.thinkkv.TaskKVAttention
              <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, full_num_heads = 0,
               full_kv_num_heads = 0, scale: float = @scale, sinks: int = @sinks, middle: int = @middle,
               stride: int = @stride, observation_window: int = @observation_window, pooling: ints = @pooling>
              (%STATES%, %REST%)
          }>
       o_output = Concat <axis = -1> (full_output, bounded_output)
     }>
}
"""


def inputs_of(overload: Overload) -> tuple[str, ...]:
    """Names of the operator's inputs; ``key`` and ``value`` are left empty where the states are packed."""
    return INPUTS + FULL_INPUTS * overload.with_full


@cache
def task_kv_attention(overload: Overload) -> onnx.FunctionProto:
    """The operator's definition for one way of using it."""
    states = bounded_states(overload)
    query, key, value = states.split(", ")
    return definition(
        _WITH_FULL_TEXT if overload.with_full else _TEXT,
        overload,
        ATTRIBUTES=", ".join((*step.ATTRIBUTES, "observation_window", "pooling")),
        INPUTS=", ".join(inputs_of(overload)),
        STEP=step.call(overload),
        APPEND=step.append(overload, ("a_output", "a_key", "a_value")),
        APART=apart(overload),
        SHIFT=_SHIFT,
        COMPACT=_COMPACT,
        PRODUCTS=products("full_"),
        STATES=states,
        QUERY=query,
        KEY=key,
        VALUE=value,
        REST=", ".join(INPUTS[3:]),
        FULL_CURSOR=", ".join(FULL_KV_INPUTS[5:]),
    )


def task_kv_node(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    heads: HeadGroup,
    slots: Slots,
    full: HeadGroup | None = None,
) -> onnx.NodeProto:
    """One use of the operator.

    Args:
        name: of the node.
        inputs, outputs: value names, in the operator's order; keys and values are empty where states are packed.
        heads: the heads with a bounded cache.
        slots: what they keep.
        full: the layer's full heads, if it has any.
    """
    node = onnx.helper.make_node(
        NAME,
        inputs,
        outputs,
        name=name,
        domain=DOMAIN,
        **heads.attributes,
        full_num_heads=full.query_heads if full else 0,
        full_kv_num_heads=full.kv_heads if full else 0,
        sinks=slots.sinks,
        middle=slots.middle,
        stride=slots.stride,
        observation_window=slots.observation_window,
        pooling=[slots.pooling],
    )
    node.overload = Overload(packed=not inputs[1], with_full=full is not None).name
    return node
