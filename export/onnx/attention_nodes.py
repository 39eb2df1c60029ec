"""What takes the place of a layer's attention node: attention of the full heads, and of those with a bounded cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from thinkkv.export.onnx import names
from thinkkv.export.onnx.cursor import TASK_KV_OUTPUTS
from thinkkv.export.onnx.domain import HeadGroup
from thinkkv.export.onnx.full_kv_attention import INPUTS as FULL_KV_INPUTS
from thinkkv.export.onnx.full_kv_attention import full_kv_node
from thinkkv.export.onnx.slots import Slots
from thinkkv.export.onnx.task_kv_attention import FULL_KV_FLAGS, task_kv_node
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.block import LayerClasses

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


@dataclass(frozen=True)
class Stock:
    """An attention node of the dense graph, and its layer's classes.

    Args:
        node: the ``GroupQueryAttention``.
        index: of the layer.
        layer: classes of its heads.
    """

    node: onnx.NodeProto
    index: int
    layer: LayerClasses

    @classmethod
    def of(cls, node: onnx.NodeProto, layers: Sequence[LayerClasses]) -> Stock:
        """The node with its layer, which the name of its cache tells.

        Raises:
            ExportError: it does something that the operators do not.
        """
        _check_stock(node)
        index = int(node.input[3].split(".")[1])
        return cls(node, index, layers[index])

    @property
    def prefix(self) -> str:
        """Of the names of what takes its place."""
        return f"/thinkkv/layers.{self.index}"

    @property
    def name(self) -> str:
        """Of the node that takes its place."""
        return f"{self.prefix}/attention"

    @property
    def packed(self) -> bool:
        """Whether queries, keys and values come in one tensor."""
        return not self.node.input[1]

    @property
    def others(self) -> int:
        """KV heads that are not full."""
        return self.layer.kv_heads - self.layer.full

    @property
    def lengths(self) -> list[str]:
        """Its inputs seqlens_k and total_sequence_length."""
        return list(self.node.input[5:7])

    @property
    def rotary(self) -> list[str]:
        """Its tables of cosines and sines."""
        return list(self.node.input[7:9])

    def group(self, kv_heads: int) -> HeadGroup:
        """So many of its KV heads and their queries."""
        scale = helper.get_node_attr_value(self.node, "scale")
        return HeadGroup(kv_heads * self.layer.query_heads // self.layer.kv_heads, kv_heads, self.layer.head_dim, scale)


class AttentionWriter:
    """Writes the attention of one layer after the other, and the graph's cache inputs and outputs.

    Args:
        graph: gets initializers.
        caches: their numbers.
        slots: what the bounded heads keep; None where every head is full.
        cache_type: element type of the caches; None for the stock graph's.
        by_products: full heads may be attended to by matrix products.

    Attributes:
        inputs, outputs: by the number of a cache, its keys and values.
    """

    def __init__(
        self, graph: onnx.GraphProto, caches: Caches, slots: Slots | None, *, cache_type: int | None, by_products: bool
    ) -> None:
        self._graph, self._caches, self._slots, self._by_products = graph, caches, slots, by_products
        first = next(value for value in graph.input if value.name == names.past(0, "key"))
        self._type = cache_type or first.type.tensor_type.elem_type
        self.inputs: dict[int, list[onnx.ValueInfoProto]] = {}
        self.outputs: dict[int, list[onnx.ValueInfoProto]] = {}

    def replace(self, node: onnx.NodeProto, layers: Sequence[LayerClasses]) -> list[onnx.NodeProto]:
        """The nodes that take one attention node's place.

        Raises:
            ExportError: it does something that the operators do not.
        """
        stock = Stock.of(node, layers)
        layer, states, output = stock.layer, node.input[:3], node.output[0]
        if not layer.full:
            return [self._task_kv(stock, states, output)]
        if layer.full == layer.kv_heads:
            return self._all_full(stock, output) if self._by_products else [self._full(stock, states, output)]
        if self._by_products:
            return [self._task_kv(stock, states, output, with_full=True)]
        splits, parts = self._split(stock)
        outputs = [f"{stock.prefix}/full", f"{stock.prefix}/bounded"]
        return [
            *splits,
            self._full(stock, parts[0], outputs[0]),
            self._task_kv(stock, parts[1], outputs[1]),
            helper.make_node("Concat", outputs, [output], name=f"{stock.prefix}/heads", axis=-1),
        ]

    def _split(self, stock: Stock) -> tuple[list[onnx.NodeProto], list[list[str]]]:
        """Split nodes, and the names of queries, keys and values of each group that the layer has."""
        groups = [stock.group(count) for count in (stock.layer.full, stock.others) if count]
        widths = [[heads * group.head_dim for heads in group.counts] for group in groups]
        parts = [[f"{stock.prefix}/{kind}{place}" for kind in "qkv"] for place in range(len(groups))]
        if stock.packed:
            flat = [[row[kind] for kind in range(3) for row in rows] for rows in (parts, widths)]
            return [self._split_node(f"{stock.prefix}/split", stock.node.input[0], *flat)], parts
        if len(groups) == 1:
            return [], [list(stock.node.input[:3])]
        return [
            self._split_node(
                f"{stock.prefix}/split_{kind}", source, [row[place] for row in parts], [row[place] for row in widths]
            )
            for place, (kind, source) in enumerate(zip("qkv", stock.node.input[:3], strict=True))
        ], parts

    def _split_node(self, name: str, source: str, outputs: list[Any], widths: list[Any]) -> onnx.NodeProto:
        sizes = f"{name}/sizes"
        self._graph.initializer.append(numpy_helper.from_array(np.array(widths, dtype=np.int64), sizes))
        return helper.make_node("Split", [source, sizes], outputs, name=name, axis=-1)

    def _full(self, stock: Stock, parts: Sequence[str], output: str) -> onnx.NodeProto:
        """The stock node over the full heads."""
        node, heads = onnx.NodeProto(), stock.group(stock.layer.full)
        node.CopyFrom(stock.node)
        past, present = self._full_cache(stock)
        node.input[:5], node.output[:] = [*parts, *past], [output, *present]
        _set_attributes(node, num_heads=heads.query_heads, kv_num_heads=heads.kv_heads)
        return node

    def _all_full(self, stock: Stock, output: str) -> list[onnx.NodeProto]:
        """FullKVAttention over all heads."""
        splits, parts = self._split(stock)
        past, present = self._full_cache(stock)
        cursor = map(names.cursor, FULL_KV_INPUTS[7:-3])
        inputs = [*parts[0], *past, *stock.lengths, *cursor, names.STEPS_ALL_FULL, *stock.rotary]
        heads = stock.group(stock.layer.full)
        return [*splits, full_kv_node(stock.name, inputs, [output, *present], heads=heads)]

    def _task_kv(self, stock: Stock, states: Sequence[str], output: str, *, with_full: bool = False) -> onnx.NodeProto:
        """TaskKVAttention over the others, or over all heads."""
        number, slots = self._caches.bounded[stock.index], self._slots
        assert slots is not None
        past, present = self._declare(number, stock.others, stock.layer.head_dim, ("slots", "slots"), 1)
        steps = names.STEPS_WITH_FULL if with_full else names.STEPS
        inputs = [*states, *past, *map(names.cursor, TASK_KV_OUTPUTS), steps, *stock.rotary]
        outputs = [output, *present]
        if with_full:
            full_past, full_present = self._full_cache(stock)
            inputs += [*full_past, *stock.lengths, *map(names.cursor, FULL_KV_FLAGS)]
            outputs += full_present
        return task_kv_node(
            stock.name,
            inputs,
            outputs,
            heads=stock.group(stock.others),
            slots=slots,
            full=stock.group(stock.layer.full) if with_full else None,
        )

    def _full_cache(self, stock: Stock) -> tuple[list[str], list[str]]:
        number, lengths = self._caches.full[stock.index], ("past_sequence_length", "total_sequence_length")
        return self._declare(number, stock.layer.full, stock.layer.head_dim, lengths, "batch_size")

    def _declare(
        self, number: int | None, kv_heads: int, dim: int, lengths: tuple[str, str], batch: int | str
    ) -> tuple[list[str], list[str]]:
        """Declare a cache; the names of its keys and values, past and present."""
        assert number is not None
        past, present = ([name(number, kind) for kind in ("key", "value")] for name in (names.past, names.present))
        for table, pair, length in ((self.inputs, past, lengths[0]), (self.outputs, present, lengths[1])):
            shape = [batch, kv_heads, length, dim]
            table[number] = [helper.make_tensor_value_info(name, self._type, shape) for name in pair]
        return past, present


def _check_stock(node: onnx.NodeProto) -> None:
    """Raise ExportError where the attention does something that the operators do not."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
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
