"""Turn the dense model's graph into one with two caches a layer: full heads, and bounded ones.

Every ``GroupQueryAttention`` of the stock builder becomes one over the full heads, which writes in place as before, and
one ``ai.thinkkv::TaskKVAttention`` over the others. Baking has put the full heads first, so that the projections only
need to be split. onnxruntime-genai numbers caches, not layers: the full ones come first, then the bounded ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from thinkkv.export.block import LayerClasses
from thinkkv.export.onnx.cursor import OUTPUTS as CURSOR
from thinkkv.export.onnx.cursor import cursor_node, task_kv_cursor
from thinkkv.export.onnx.operator import DOMAIN, OPSETS, VERSION, HeadGroup, task_kv_attention, task_kv_node
from thinkkv.export.onnx.slots import Slots
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


def rewrite(model: onnx.ModelProto, layers: Sequence[LayerClasses], slots: Slots | None) -> Caches:
    """Give a dense graph its two caches, in place.

    Args:
        model: what the stock builder made of the baked checkpoint; its weights may stay outside.
        layers: classes per layer.
        slots: what the bounded heads keep; None where every head is full.

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
    writer = _Writer(model, caches, slots)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == ATTENTION:
            nodes += writer.attention(node, layers)
        else:
            nodes.append(node)
    bounded = caches.bounded_numbers
    if bounded and slots is not None:
        names = tuple(map(_cursor_name, CURSOR))
        nodes.insert(0, cursor_node(DOMAIN, _past(bounded[0], "key"), names, slots))
        model.functions.extend([task_kv_cursor(), task_kv_attention()])
        _declare_one_sequence(graph)
    del graph.node[:]
    graph.node.extend(nodes)
    _replace_caches(graph, writer.inputs, writer.outputs)
    _set_opsets(model)
    return caches


class _Writer:
    """Writes the attention of one layer after the other, and the graph's cache inputs and outputs."""

    def __init__(self, model: onnx.ModelProto, caches: Caches, slots: Slots | None) -> None:
        self._graph, self._caches, self._slots = model.graph, caches, slots
        first = next(value for value in model.graph.input if value.name == _past(0, "key"))
        self._type = first.type.tensor_type.elem_type
        self.inputs: dict[int, list[onnx.ValueInfoProto]] = {}
        self.outputs: dict[int, list[onnx.ValueInfoProto]] = {}

    def attention(self, node: onnx.NodeProto, layers: Sequence[LayerClasses]) -> list[onnx.NodeProto]:
        """The nodes that take one attention node's place."""
        index = int(node.input[3].split(".")[1])
        layer, attributes = layers[index], {a.name: helper.get_attribute_value(a) for a in node.attribute}
        _check_stock(node, attributes)
        full, others = layer.full, layer.kv_heads - layer.full
        if not others:
            self._full_cache(node, index, layer, full)
            return [node]
        prefix = f"/thinkkv/layers.{index}"
        splits, parts = self._split(prefix, node, layer)
        outputs, nodes = [], list(splits)
        if full:
            stock = onnx.NodeProto()
            stock.CopyFrom(node)
            stock.input[:3] = parts[0]
            stock.output[0] = f"{prefix}/full"
            _set_attributes(stock, num_heads=full * layer.query_heads // layer.kv_heads, kv_num_heads=full)
            self._full_cache(stock, index, layer, full)
            nodes.append(stock)
            outputs.append(stock.output[0])
        outputs.append(f"{prefix}/bounded" if full else node.output[0])
        nodes.append(self._bounded(prefix, outputs[-1], parts[-1], index, layer, attributes["scale"], list(node.input)))
        if full:
            nodes.append(helper.make_node("Concat", outputs, [node.output[0]], name=f"{prefix}/heads", axis=-1))
        return nodes

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

    def _full_cache(self, node: onnx.NodeProto, index: int, layer: LayerClasses, heads: int) -> None:
        number = self._caches.full[index]
        assert number is not None
        node.input[3:5] = [_past(number, "key"), _past(number, "value")]
        node.output[1:3] = [_present(number, "key"), _present(number, "value")]
        self._declare(number, heads, layer.head_dim, ("past_sequence_length", "total_sequence_length"), "batch_size")

    def _bounded(
        self,
        prefix: str,
        output: str,
        parts: list[str],
        index: int,
        layer: LayerClasses,
        scale: float,
        stock: list[str],
    ) -> onnx.NodeProto:
        number = self._caches.bounded[index]
        assert number is not None
        assert self._slots is not None
        heads = layer.kv_heads - layer.full
        self._declare(number, heads, layer.head_dim, ("slots", "slots"), 1)
        group = HeadGroup(heads * layer.query_heads // layer.kv_heads, heads, layer.head_dim, scale)
        cursor = map(_cursor_name, CURSOR)
        return task_kv_node(
            f"{prefix}/attention",
            [*parts, _past(number, "key"), _past(number, "value"), *cursor, stock[7], stock[8]],
            [output, _present(number, "key"), _present(number, "value")],
            heads=group,
            slots=self._slots,
        )

    def _declare(self, number: int, heads: int, dim: int, lengths: tuple[str, str], batch: int | str) -> None:
        for kind in ("key", "value"):
            for table, name, length in (
                (self.inputs, _past(number, kind), lengths[0]),
                (self.outputs, _present(number, kind), lengths[1]),
            ):
                value = helper.make_tensor_value_info(name, self._type, [batch, heads, length, dim])
                table.setdefault(number, []).append(value)


def _past(number: int, kind: str) -> str:
    return f"past_key_values.{number}.{kind}"


def _present(number: int, kind: str) -> str:
    return f"present.{number}.{kind}"


def _cursor_name(name: str) -> str:
    return f"/thinkkv/{name}"


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
