"""Texts for definitions: the states of a layer's heads, taken apart by kind and by group."""

from __future__ import annotations

from thinkkv.export.onnx.domain import Overload

_COUNTS = """
  w_zero = Constant <value_ints = [0]> ()
  w_query_heads_0 = Constant <value_int: int = @num_heads> ()
  w_heads_0 = Constant <value_int: int = @kv_num_heads> ()
  w_query_heads = Unsqueeze (w_query_heads_0, w_zero)
  w_heads = Unsqueeze (w_heads_0, w_zero)
  w_half = Shape <start = 1, end = 2> (cos_cache)
  w_dim = Add (w_half, w_half)
"""

_FULL_COUNTS = """
  w_full_query_heads_0 = Constant <value_int: int = @full_num_heads> ()
  w_full_heads_0 = Constant <value_int: int = @full_kv_num_heads> ()
  w_full_query_heads = Unsqueeze (w_full_query_heads_0, w_zero)
  w_full_heads = Unsqueeze (w_full_heads_0, w_zero)
"""

_APART = """
  w_counts = Concat <axis = 0> (w_query_heads, w_heads, w_heads)
  w_widths = Mul (w_counts, w_dim)
  bounded_query, bounded_key, bounded_value = Split <axis = -1> (query, w_widths)
"""

_GROUPS_APART = """
  w_counts = Concat <axis = 0> (w_full_query_heads, w_query_heads, w_full_heads, w_heads, w_full_heads, w_heads)
  w_widths = Mul (w_counts, w_dim)
  full_query, bounded_query, full_key, bounded_key, full_value, bounded_value = Split <axis = -1> (query, w_widths)
"""

_GROUPS_OF_EACH = """
  w_query_counts = Concat <axis = 0> (w_full_query_heads, w_query_heads)
  w_counts = Concat <axis = 0> (w_full_heads, w_heads)
  w_query_widths = Mul (w_query_counts, w_dim)
  w_widths = Mul (w_counts, w_dim)
  full_query, bounded_query = Split <axis = -1> (query, w_query_widths)
  full_key, bounded_key = Split <axis = -1> (key, w_widths)
  full_value, bounded_value = Split <axis = -1> (value, w_widths)
"""


def apart(overload: Overload) -> str:
    """Statements that give ``bounded_query``, ``bounded_key`` and ``bounded_value``, and the same of the full heads.

    Where there is nothing to take apart there are none: the states are the inputs then, see ``bounded_states``.
    """
    if overload.with_full:
        return _COUNTS + _FULL_COUNTS + (_GROUPS_APART if overload.packed else _GROUPS_OF_EACH)
    return _COUNTS + _APART if overload.packed else ""


def bounded_states(overload: Overload) -> str:
    """Names of the bounded heads' queries, keys and values, once taken ``apart``."""
    prefix = "bounded_" if overload.with_full or overload.packed else ""
    return ", ".join(f"{prefix}{kind}" for kind in ("query", "key", "value"))


def attended_states(overload: Overload) -> str:
    """The same as ``GroupQueryAttention`` takes them: it takes packed states of one group as they come."""
    return "query, , " if overload == Overload(packed=True) else bounded_states(overload)
