"""Turn the dense model's graph into one with two caches a layer: full heads, and bounded ones.

Every ``GroupQueryAttention`` of the stock builder becomes one over the full heads, which writes in place as before, and
one ``ai.thinkkv::TaskKVAttention`` over the others. On a CPU the latter serves both groups of a layer, because each
branch costs time. Baking has put the full heads first, so that the projections only need to be split.
onnxruntime-genai numbers caches, not layers: the full ones come first, then the bounded ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
from onnx import helper

from thinkkv.export.onnx import names
from thinkkv.export.onnx.attention_nodes import AttentionWriter, Caches
from thinkkv.export.onnx.cursor import (
    FULL_KV_OUTPUTS,
    TASK_KV_OUTPUTS,
    full_kv_cursor,
    full_kv_cursor_node,
    step_cursor,
    step_cursor_node,
    task_kv_cursor,
    task_kv_cursor_node,
)
from thinkkv.export.onnx.domain import DOMAIN, OPSETS, OVERLOADS, VERSION, Overload
from thinkkv.export.onnx.full_kv_attention import full_kv_attention
from thinkkv.export.onnx.slots import Slots
from thinkkv.export.onnx.task_kv_attention import NAME as TASK_KV_ATTENTION
from thinkkv.export.onnx.task_kv_attention import task_kv_attention
from thinkkv.export.onnx.task_kv_step import task_kv_step
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.block import LayerClasses

ATTENTION = "GroupQueryAttention"
IR_VERSION = 11

_STEPS = {names.STEPS: "appends", names.STEPS_WITH_FULL: "stock", names.STEPS_ALL_FULL: "by_products"}
"""StepCursor's outputs, and the cursor that says whether the definition of TaskKVStep serves such a layer."""


def rewrite(
    model: onnx.ModelProto,
    layers: Sequence[LayerClasses],
    slots: Slots | None,
    *,
    on_cpu: bool,
    cache_type: int | None = None,
) -> Caches:
    """Give a dense graph its two caches, in place.

    Args:
        model: what the stock builder made of the baked checkpoint; its weights may stay outside.
        layers: classes per layer.
        slots: what the bounded heads keep; None where every head is full.
        on_cpu: the graph is for a CPU.
        cache_type: element type of the caches; None for the stock graph's.

    Raises:
        ExportError: the builder's graph is not as expected.
    """
    graph, caches = model.graph, Caches.of(layers)
    attention = [node for node in graph.node if node.op_type == ATTENTION]
    if len(attention) != len(layers):
        raise ExportError(
            f"the built graph has {len(attention)} {ATTENTION} nodes for {len(layers)} layers - "
            "use a version of onnxruntime-genai that docs/export.md lists"
        )
    by_products = on_cpu and slots is not None
    writer = AttentionWriter(graph, caches, slots, cache_type=cache_type, by_products=by_products)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == ATTENTION:
            nodes += writer.replace(node, layers)
        else:
            nodes.append(node)
    if slots is not None:
        has_full = on_cpu and any(layer.full for layer in layers)
        model.functions.extend(_definitions(nodes, has_full))
        read = {value for node in nodes for value in node.input}
        nodes = [*_cursors(slots, has_full, read), *nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    _replace_caches(graph, writer.inputs, writer.outputs)
    if slots is not None:
        _declare_one_sequence(graph)
    _set_opsets(model)
    return caches


def _definitions(nodes: Iterable[onnx.NodeProto], has_full: bool) -> list[onnx.FunctionProto]:
    """The operators that a graph of these nodes uses."""
    names_used = {Overload().name, *(node.overload for node in nodes if node.op_type == TASK_KV_ATTENTION)}
    used = [overload for overload in OVERLOADS if overload.name in names_used]
    functions = [task_kv_cursor(), step_cursor(), *map(task_kv_attention, used), *map(task_kv_step, used)]
    if has_full:
        functions += [full_kv_cursor(), full_kv_attention(), task_kv_step(Overload(all_full=True))]
    return functions


def _cursors(slots: Slots, has_full: bool, read: set[str]) -> list[onnx.NodeProto]:
    """The nodes that say where a call stands, to attention nodes that read these values."""
    outputs = [names.cursor(output) for output in TASK_KV_OUTPUTS]
    cursors = [task_kv_cursor_node(outputs, capacity=slots.capacity, stride=slots.stride)]
    if has_full:
        outputs = [names.cursor(output) for output in FULL_KV_OUTPUTS]
        cursors.append(full_kv_cursor_node(names.past(0, "key"), names.cursor("appends"), outputs))
    steps = (step_cursor_node(names.cursor(served), steps) for steps, served in _STEPS.items() if steps in read)
    return [*cursors, *steps]


def _declare_one_sequence(graph: onnx.GraphProto) -> None:
    """Fix the first dimension of all inputs: a runtime then refuses a batch by the name of the input that is one.

    And whatever else has that dimension: ONNX Runtime reuses a buffer only for a value whose shape it knows to be the
    same, and one is not ``batch_size`` to it.
    """
    batch = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input} - {""}
    for value in (*graph.input, *graph.value_info, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in batch:
                dimension.dim_value = 1


def _replace_caches(
    graph: onnx.GraphProto,
    inputs: dict[int, list[onnx.ValueInfoProto]],
    outputs: dict[int, list[onnx.ValueInfoProto]],
) -> None:
    """Declare the caches in the order of their numbers; onnxruntime-genai finds them by name."""
    for values, prefix, new in ((graph.input, "past_key_values.", inputs), (graph.output, "present.", outputs)):
        kept = [value for value in values if not value.name.startswith(prefix)]
        del values[:]
        values.extend([*kept, *_flattened(new)])
    stale = {value.name for value in (*_flattened(inputs), *_flattened(outputs))}
    known = [value for value in graph.value_info if value.name not in stale]
    del graph.value_info[:]
    graph.value_info.extend(known)


def _flattened(by_number: dict[int, list[onnx.ValueInfoProto]]) -> Iterable[onnx.ValueInfoProto]:
    return [value for number in sorted(by_number) for value in by_number[number]]


def _set_opsets(model: onnx.ModelProto) -> None:
    wanted = {opset.domain: opset.version for opset in model.opset_import} | OPSETS | {DOMAIN: VERSION}
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in wanted.items())
    model.ir_version = max(model.ir_version, IR_VERSION)
