"""``ai.thinkkv::FullKVAttention``, version 1: the full heads of a layer, on a CPU.

``GroupQueryAttention`` reads a KV head once for each of its query heads, and a thread attends to a whole head. With few
full heads and many tokens that is most of a step. Two matrix products over the cache as it lies read each KV head once
and share it among the threads, but know no length: they go over the whole buffer. So the products serve single tokens
once at least half of a long buffer is in use, and everything else is left to ``GroupQueryAttention``. Both write the
new token in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx
import onnx.parser

from thinkkv.export.onnx.domain import DOMAIN, HeadGroup

NAME = "FullKVAttention"
INPUTS = (
    *("query", "key", "value", "past_key", "past_value"),
    *("seqlens_k", "total_sequence_length", "position_ids", "write_slot", "mask", "blocks", "by_products"),
    *("cos_cache", "sin_cache"),
)

# Keys come first in their product: the second factor is copied before it is used, and they are most of what is read.
# Values are the second factor of theirs. It is not copied for one row alone, but then is read once for each query head;
# block by block all but the first find it in the processor's cache.
_PRODUCTS = """
  p_one = Constant <value_ints = [1]> ()
  p_rest = Constant <value_ints = [-1]> ()
  p_zero = Constant <value_ints = [0]> ()
  p_heads_0 = Constant <value_int: int = @%FULL%kv_num_heads> ()
  p_heads = Unsqueeze (p_heads_0, p_zero)
  p_half = Shape <start = 1, end = 2> (cos_cache)
  p_dim = Add (p_half, p_half)
  p_new_shape = Concat <axis = 0> (p_one, p_heads, p_one, p_dim)
  p_query_shape = Concat <axis = 0> (p_one, p_heads, p_rest, p_dim)
  p_flat_shape = Concat <axis = 0> (p_one, p_one, p_rest)
  p_rotated_key = com.microsoft.RotaryEmbedding (%FULL%key, position_ids, cos_cache, sin_cache)
  p_rotated_query = com.microsoft.RotaryEmbedding (%FULL%query, position_ids, cos_cache, sin_cache)
  p_stored_key = CastLike (p_rotated_key, %FULL%past_key)
  p_stored_value = CastLike (%FULL%value, %FULL%past_value)
  p_new_key = Reshape (p_stored_key, p_new_shape)
  p_new_value = Reshape (p_stored_value, p_new_shape)
  p_key = TensorScatter <axis = 2> (%FULL%past_key, p_new_key, write_slot)
  p_value = TensorScatter <axis = 2> (%FULL%past_value, p_new_value, write_slot)
  p_query = Reshape (p_rotated_query, p_query_shape)
  p_keys = CastLike (p_key, p_query)
  p_values = CastLike (p_value, p_query)
  p_by_token = com.microsoft.FusedMatMul <transB = 1, alpha: float = @scale> (p_keys, p_query)
  p_logits = Transpose <perm = [0, 1, 3, 2]> (p_by_token)
  p_masked = Add (p_logits, mask)
  p_weights = Softmax <axis = -1> (p_masked)
  p_row_axis = Constant <value_ints = [3]> ()
  p_length = Shape <start = 2, end = 3> (%FULL%past_key)
  p_block = Div (p_length, blocks)
  p_weights_shape = Concat <axis = 0> (p_heads, p_rest, blocks, p_block)
  p_value_shape = Concat <axis = 0> (p_heads, blocks, p_one, p_block, p_rest)
  p_by_query = Reshape (p_weights, p_weights_shape)
  p_by_block = Transpose <perm = [0, 2, 1, 3]> (p_by_query)
  p_rows = Unsqueeze (p_by_block, p_row_axis)
  p_blocks = Reshape (p_values, p_value_shape)
  p_parts = MatMul (p_rows, p_blocks)
  p_attended = ReduceSum <keepdims = 0> (p_parts, p_one)
  p_output = Reshape (p_attended, p_flat_shape)
"""

_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24, "com.microsoft": 1, "ai.thinkkv": 1]>
FullKVAttention <num_heads, kv_num_heads, scale> (%INPUTS%) => (output, present_key, present_value)
{
  output, present_key, present_value = If (by_products)
    <then_branch = step () => (p_output, p_key, p_value) {
       p_output, p_key, p_value = ai.thinkkv.TaskKVStep:all_full
         <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, full_num_heads = 0, full_kv_num_heads = 0,
          scale: float = @scale, sinks = 0, middle = 0, stride = 0>
         (query, key, value, past_key, past_value, position_ids, , , , cos_cache, sin_cache, , , , , write_slot, mask,
          blocks)
     },
     else_branch = stock () => (s_output, s_key, s_value) {
       s_output, s_key, s_value = com.microsoft.GroupQueryAttention
         <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1>
         (query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache)
     }>
}
"""


def products(prefix: str) -> str:
    """The matrix products, with ``prefix`` to the names of queries, keys, values, past and the count of heads."""
    return _PRODUCTS.replace("%FULL%", prefix)


@cache
def full_kv_attention() -> onnx.FunctionProto:
    """The operator's definition."""
    return onnx.parser.parse_function(_TEXT.replace("%INPUTS%", ", ".join(INPUTS)))


def full_kv_node(name: str, inputs: Sequence[str], outputs: Sequence[str], *, heads: HeadGroup) -> onnx.NodeProto:
    """One use of the operator.

    Args:
        name: of the node.
        inputs, outputs: value names, in the operator's order.
        heads: the heads that it attends.
    """
    return onnx.helper.make_node(NAME, inputs, outputs, name=name, domain=DOMAIN, **heads.attributes)
