"""``ai.thinkkv::TaskKVStep``, version 1: attention of one new token in all heads of a layer.

Most steps of decoding need no more than a ``GroupQueryAttention`` for each group of heads, or matrix products where
all heads are full: that is what the definitions below have, and StepCursor sends them no other steps. A runtime that
has both operators in C (``thinkkv.kernels.task_kv_step``) takes those instead of the definitions, and then the same
graph does every step in one call per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import onnx

from thinkkv.export.onnx.definition import definition
from thinkkv.export.onnx.domain import Overload
from thinkkv.export.onnx.full_kv_attention import products
from thinkkv.export.onnx.head_groups import apart, attended_states

NAME = "TaskKVStep"
INPUTS = (
    *("query", "key", "value", "past_key", "past_value", "position_ids", "held", "slots_in_use", "last_slot"),
    *("cos_cache", "sin_cache"),
)
FULL_INPUTS = ("full_past_key", "full_past_value", "seqlens_k", "total_sequence_length")
"""Behind them where the layer has full heads."""
PRODUCT_INPUTS = ("write_slot", "mask", "blocks")
"""Behind both where all heads are full, for FullKVAttention's products."""
OUTPUTS = ("output", "present_key", "present_value")
FULL_OUTPUTS = ("full_present_key", "full_present_value")
"""Behind them where the layer has full heads."""
ATTRIBUTES = ("num_heads", "kv_num_heads", "full_num_heads", "full_kv_num_heads", "scale", "sinks", "middle", "stride")

_APPEND = """
  %OUTPUTS% = com.microsoft.GroupQueryAttention
    <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads, scale: float = @scale, do_rotary = 1>
    (%STATES%, past_key, past_value, last_slot, slots_in_use, cos_cache, sin_cache, position_ids)
"""

_FULL = """
  full_output, full_present_key, full_present_value = com.microsoft.GroupQueryAttention
    <num_heads: int = @full_num_heads, kv_num_heads: int = @full_kv_num_heads, scale: float = @scale, do_rotary = 1>
    (full_query, full_key, full_value, full_past_key, full_past_value, seqlens_k, total_sequence_length,
     cos_cache, sin_cache)
  output = Concat <axis = -1> (full_output, bounded_output)
"""

_TEXT = """
<domain: "ai.thinkkv", opset_import: ["": 24, "com.microsoft": 1]>
TaskKVStep <%ATTRIBUTES%> (%INPUTS%) => (%OUTPUTS%)
{%BODY%}
"""


def inputs_of(overload: Overload) -> tuple[str, ...]:
    """Names of the operator's inputs; ``key`` and ``value`` are left empty where the states are packed."""
    if overload.all_full:
        return INPUTS + FULL_INPUTS + PRODUCT_INPUTS
    return INPUTS + FULL_INPUTS * overload.with_full


def outputs_of(overload: Overload) -> tuple[str, ...]:
    """Names of the operator's outputs."""
    return OUTPUTS + FULL_OUTPUTS * overload.with_full


def append(overload: Overload, outputs: Sequence[str]) -> str:
    """What bounded heads do while new tokens fit behind the old ones: as with a full cache, written in place."""
    return _APPEND.replace("%STATES%", attended_states(overload)).replace("%OUTPUTS%", ", ".join(outputs))


def call(overload: Overload) -> str:
    """The operator's use in another definition, which has attributes and inputs of the same names."""
    types = {"scale": "float"}
    attributes = (f"{name}: {types.get(name, 'int')} = @{name}" for name in ATTRIBUTES)
    name = f"{NAME}:{overload.name}" if overload.name else NAME
    return f"ai.thinkkv.{name} <{', '.join(attributes)}> ({', '.join(inputs_of(overload))})"


@cache
def task_kv_step(overload: Overload) -> onnx.FunctionProto:
    """The operator's definition for one way of using it."""
    outputs = outputs_of(overload)
    if overload.all_full:
        body, outputs = products(""), ("p_output", "p_key", "p_value")
    elif overload.with_full:
        body = apart(overload) + append(overload, ("bounded_output", *OUTPUTS[1:])) + _FULL
    else:
        body = append(overload, OUTPUTS)
    return definition(
        _TEXT,
        overload,
        ATTRIBUTES=", ".join(ATTRIBUTES),
        INPUTS=", ".join(inputs_of(overload)),
        OUTPUTS=", ".join(outputs),
        BODY=body,
    )
