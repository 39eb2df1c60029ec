"""Turn the dense model's graph into one with two caches a layer: full heads, and bounded ones.

Every ``GroupQueryAttention`` of the stock builder becomes one over the full heads, which writes in place as before, and
one ``ai.thinkkv::TaskKVAttention`` over the others. On a CPU the latter serves both groups of a layer, because each
branch costs time. Baking has put the full heads first, so that the projections only need to be split.
onnxruntime-genai numbers caches, not layers: the full ones come first, then the bounded ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from thinkkv.export.block import LayerClasses
from thinkkv.export.onnx.cursor import (
    FULL_KV_OUTPUTS,
    TASK_KV_OUTPUTS,
    full_kv_cursor,
    full_kv_cursor_node,
    task_kv_cursor,
    task_kv_cursor_node,
)
from thinkkv.export.onnx.domain import DOMAIN, OPSETS, VERSION, HeadGroup
from thinkkv.export.onnx.full_kv_attention import full_kv_attention, full_kv_node
from thinkkv.export.onnx.slots import Slots
from thinkkv.export.onnx.task_kv_attention import NAME as TASK_KV_ATTENTION
from thinkkv.export.onnx.task_kv_attention import task_kv_attention, task_kv_node
from thinkkv.patches.errors import ExportError

ATTENTION = "GroupQueryAttention"
IR_VERSION = 11
_EXPECTED = {"do_rotary": 1, "rotary_interleaved": 0, "local_window_size": -1, "softcap": 0.0}


@dataclass(frozen=True)
class Caches:
    """The caches of a rewritten graph.

    Args:
        full: per layer the number of its full cache, None where it has none.
        bounded: the same for its bounded cache.
    """

    full: tuple[int | None, ...]
    bounded: tuple[int | None, ...]

    @classmethod
    def of(cls, layers: Sequence[LayerClasses]) -> Caches:
        """Number the caches of all layers, full ones first."""
        full = iter(range(len(layers)))
        numbers = tuple(next(full) if layer.full else None for layer in layers)
        first = sum(number is not None for number in numbers)
        bounded = iter(range(first, first + len(layers)))
        return cls(numbers, tuple(next(bounded) if layer.full < layer.kv_heads else None for layer in layers))

    @property
    def bounded_numbers(self) -> list[int]:
        """The bounded caches, ascending."""
        return [number for number in self.bounded if number is not None]


def rewrite(model: onnx.ModelProto, layers: Sequence[LayerClasses], slots: Slots | None, *, on_cpu: bool) -> Caches:
    """Give a dense graph its two caches, in place.

    Args:
        model: what the stock builder made of the baked checkpoint; its weights may stay outside.
        layers: classes per layer.
        slots: what the bounded heads keep; None where every head is full.
        on_cpu: the graph is for a CPU.

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
    writer = _Writer(model, caches, slots, by_products=on_cpu and slots is not None)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == ATTENTION:
            nodes += writer.attention(node, layers)
        else:
            nodes.append(node)
    bounded = caches.bounded_numbers
    if bounded and slots is not None:
        used = {node.overload for node in nodes if node.domain == DOMAIN and node.op_type == TASK_KV_ATTENTION}
        model.functions.extend([task_kv_cursor(), *(task_kv_attention(overload) for overload in sorted({"", *used}))])
        if on_cpu and bounded[0]:  # there are full caches before it
            nodes.insert(0, _full_kv_cursor())
            model.functions.extend([full_kv_cursor(), full_kv_attention()])
        nodes.insert(0, _task_kv_cursor(slots))
        _declare_one_sequence(graph)
    del graph.node[:]
    graph.node.extend(nodes)
    _replace_caches(graph, writer.inputs, writer.outputs)
    _set_opsets(model)
    return caches


class _Writer:
    """Writes the attention of one layer after the other, and the graph's cache inputs and outputs."""

    def __init__(self, model: onnx.ModelProto, caches: Caches, slots: Slots | None, *, by_products: bool) -> None:
        self._graph, self._caches, self._slots, self._by_products = model.graph, caches, slots, by_products
        first = next(value for value in model.graph.input if value.name == _past(0, "key"))
        self._type = first.type.tensor_type.elem_type
        self.inputs: dict[int, list[onnx.ValueInfoProto]] = {}
        self.outputs: dict[int, list[onnx.ValueInfoProto]] = {}

    def attention(self, node: onnx.NodeProto, layers: Sequence[LayerClasses]) -> list[onnx.NodeProto]:
        """The nodes that take one attention node's place."""
        index = int(node.input[3].split(".")[1])
        layer, attributes = layers[index], {a.name: helper.get_attribute_value(a) for a in node.attribute}
        _check_stock(node, attributes)
        prefix, output = f"/thinkkv/layers.{index}", node.output[0]
        if not layer.full:
            return [self._bounded(node, index, layer, node.input[:3], output)]
        if layer.full == layer.kv_heads and not self._by_products:
            return [self._stock(node, index, layer, node.input[:3], output)]
        splits, parts = self._split(prefix, node, layer)
        if layer.full == layer.kv_heads:
            return [*splits, self._products(node, index, layer, parts[0], output)]
        if self._by_products:
            return [*splits, self._both(node, index, layer, parts, output)]
        outputs = [f"{prefix}/full", f"{prefix}/bounded"]
        return [
            *splits,
            self._stock(node, index, layer, parts[0], outputs[0]),
            self._bounded(node, index, layer, parts[1], outputs[1]),
            helper.make_node("Concat", outputs, [output], name=f"{prefix}/heads", axis=-1),
        ]

    def _split(
        self, prefix: str, node: onnx.NodeProto, layer: LayerClasses
    ) -> tuple[list[onnx.NodeProto], list[list[str]]]:
        """Split nodes, and the names of queries, keys and values of each group that the layer has."""
        counts = [count for count in (layer.full, layer.kv_heads - layer.full) if count]
        group = layer.query_heads // layer.kv_heads
        widths = [[count * group * layer.head_dim, *[count * layer.head_dim] * 2] for count in counts]
        names = [[f"{prefix}/{kind}{place}" for kind in "qkv"] for place in range(len(counts))]
        if not node.input[1]:  # queries, keys and values come packed
            flat_names = [names[place][kind] for kind in range(3) for place in range(len(counts))]
            flat_widths = [widths[place][kind] for kind in range(3) for place in range(len(counts))]
            return [self._split_node(f"{prefix}/split", node.input[0], flat_names, flat_widths)], names
        if len(counts) == 1:
            return [], [list(node.input[:3])]
        return [
            self._split_node(f"{prefix}/split_{'qkv'[kind]}", node.input[kind], both[0], both[1])
            for kind in range(3)
            for both in [([names[0][kind], names[1][kind]], [widths[0][kind], widths[1][kind]])]
        ], names

    def _split_node(self, name: str, source: str, outputs: list[str], widths: list[int]) -> onnx.NodeProto:
        sizes = f"{name}/sizes"
        self._graph.initializer.append(numpy_helper.from_array(np.array(widths, dtype=np.int64), sizes))
        return helper.make_node("Split", [source, sizes], outputs, name=name, axis=-1)

    def _stock(
        self, node: onnx.NodeProto, index: int, layer: LayerClasses, parts: Sequence[str], output: str
    ) -> onnx.NodeProto:
        """The stock node over the full heads."""
        stock, heads = onnx.NodeProto(), self._group(node, layer, layer.full)
        stock.CopyFrom(node)
        past, present = self._full_cache(index, layer)
        stock.input[:5], stock.output[:] = [*parts, *past], [output, *present]
        _set_attributes(stock, num_heads=heads.query_heads, kv_num_heads=heads.kv_heads)
        return stock

    def _products(
        self, node: onnx.NodeProto, index: int, layer: LayerClasses, parts: Sequence[str], output: str
    ) -> onnx.NodeProto:
        """FullKVAttention, where all heads are full."""
        past, present = self._full_cache(index, layer)
        cursor = map(_cursor_name, ("position_ids", *FULL_KV_OUTPUTS[:-1]))
        return full_kv_node(
            f"/thinkkv/layers.{index}/attention",
            [*parts, *past, *node.input[5:7], *cursor, *node.input[7:9]],
            [output, *present],
            heads=self._group(node, layer, layer.full),
        )

    def _bounded(
        self, node: onnx.NodeProto, index: int, layer: LayerClasses, parts: Sequence[str], output: str
    ) -> onnx.NodeProto:
        """TaskKVAttention over the heads that are not full."""
        inputs, outputs = self._bounded_values(node, index, layer)
        return task_kv_node(
            f"/thinkkv/layers.{index}/attention",
            [*filter(None, parts), *inputs],
            [output, *outputs],
            heads=self._group(node, layer, layer.kv_heads - layer.full),
            slots=self._kept,
            packed=not parts[1],
        )

    def _both(
        self, node: onnx.NodeProto, index: int, layer: LayerClasses, parts: list[list[str]], output: str
    ) -> onnx.NodeProto:
        """TaskKVAttention over the full heads and the others."""
        inputs, outputs = self._bounded_values(node, index, layer)
        past, present = self._full_cache(index, layer)
        cursor = map(_cursor_name, FULL_KV_OUTPUTS)
        return task_kv_node(
            f"/thinkkv/layers.{index}/attention",
            [*parts[1], *inputs, *parts[0], *past, *node.input[5:7], *cursor],
            [output, *outputs, *present],
            heads=self._group(node, layer, layer.kv_heads - layer.full),
            slots=self._kept,
            full=self._group(node, layer, layer.full),
        )

    def _bounded_values(self, node: onnx.NodeProto, index: int, layer: LayerClasses) -> tuple[list[str], list[str]]:
        """TaskKVAttention's inputs from the cache on, and its outputs for it."""
        number = self._caches.bounded[index]
        assert number is not None
        heads = layer.kv_heads - layer.full
        past, present = self._declare(number, heads, layer.head_dim, ("slots", "slots"), 1)
        return [*past, *map(_cursor_name, TASK_KV_OUTPUTS), *node.input[7:9]], present

    @property
    def _kept(self) -> Slots:
        assert self._slots is not None
        return self._slots

    def _group(self, node: onnx.NodeProto, layer: LayerClasses, kv_heads: int) -> HeadGroup:
        scale = helper.get_node_attr_value(node, "scale")
        return HeadGroup(kv_heads * layer.query_heads // layer.kv_heads, kv_heads, layer.head_dim, scale)

    def _full_cache(self, index: int, layer: LayerClasses) -> tuple[list[str], list[str]]:
        number = self._caches.full[index]
        assert number is not None
        lengths = ("past_sequence_length", "total_sequence_length")
        return self._declare(number, layer.full, layer.head_dim, lengths, "batch_size")

    def _declare(
        self, number: int, kv_heads: int, dim: int, lengths: tuple[str, str], batch: int | str
    ) -> tuple[list[str], list[str]]:
        """Declare a cache; the names of its keys and values, past and present."""
        past, present = ([name(number, kind) for kind in ("key", "value")] for name in (_past, _present))
        for table, names, length in ((self.inputs, past, lengths[0]), (self.outputs, present, lengths[1])):
            shape = [batch, kv_heads, length, dim]
            table[number] = [helper.make_tensor_value_info(name, self._type, shape) for name in names]
        return past, present


def _past(number: int, kind: str) -> str:
    return f"past_key_values.{number}.{kind}"


def _present(number: int, kind: str) -> str:
    return f"present.{number}.{kind}"


def _cursor_name(name: str) -> str:
    return f"/thinkkv/{name}"


def _task_kv_cursor(slots: Slots) -> onnx.NodeProto:
    names = [_cursor_name(name) for name in TASK_KV_OUTPUTS]
    return task_kv_cursor_node(names, capacity=slots.capacity, stride=slots.stride)


def _full_kv_cursor() -> onnx.NodeProto:
    return full_kv_cursor_node(
        _past(0, "key"), _cursor_name("appends"), [_cursor_name(name) for name in FULL_KV_OUTPUTS]
    )


def _check_stock(node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    """Raise ExportError where the attention does something that the operator does not."""
    differing = [name for name, value in _EXPECTED.items() if attributes.get(name, value) != value]
    extra = [name for name in node.input[9:] if name]
    if differing or extra:
        what = f"{differing[0]}={attributes[differing[0]]}" if differing else f"the input {extra[0]}"
        raise ExportError(
            f"the model's attention uses {what}, which a bounded cache cannot serve yet - use safetensors"
        )


def _set_attributes(node: onnx.NodeProto, **values: int) -> None:
    kept = [attribute for attribute in node.attribute if attribute.name not in values]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in values.items())])


def _declare_one_sequence(graph: onnx.GraphProto) -> None:
    """Fix the first dimension of all inputs: a runtime then refuses a batch by the name of the input that is one."""
    for value in graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


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
