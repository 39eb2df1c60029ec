"""Models of one node of ``ai.thinkkv``, run by ONNX Runtime and by the numpy reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from thinkkv.export.onnx.cursor import full_kv_cursor, step_cursor, task_kv_cursor
from thinkkv.export.onnx.domain import DOMAIN, OPSETS, OVERLOADS, VERSION, Overload
from thinkkv.export.onnx.full_kv_attention import full_kv_attention
from thinkkv.export.onnx.reference import FullKVAttention, TaskKVAttention
from thinkkv.export.onnx.task_kv_attention import task_kv_attention
from thinkkv.export.onnx.task_kv_step import task_kv_step

DIM = 16
Feeds = Mapping[str, Any]


def rotary(length: int) -> dict[str, Any]:
    """Cosines and sines for so many positions."""
    angle = np.arange(length)[:, None] / 100 ** (np.arange(DIM // 2) / (DIM // 2))
    return {"cos_cache": np.cos(angle).astype(np.float32), "sin_cache": np.sin(angle).astype(np.float32)}


def one_node(node: onnx.NodeProto, feeds: Feeds, outputs: Mapping[str, int]) -> onnx.ModelProto:
    """A model of it, its inputs like ``feeds``; outputs by their TensorProto type."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)
        for name, array in feeds.items()
    ]
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    opsets = [helper.make_opsetid(domain, version) for domain, version in (*OPSETS.items(), (DOMAIN, VERSION))]
    graph = helper.make_graph([node], "one_node", inputs, results)
    functions = [task_kv_cursor(), full_kv_cursor(), step_cursor(), full_kv_attention()]
    functions += [define(overload) for define in (task_kv_attention, task_kv_step) for overload in OVERLOADS]
    functions.append(task_kv_step(Overload(all_full=True)))
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)


def results(names: Sequence[str], cache: Any = np.float32) -> dict[str, int]:
    """Outputs of the operators: floats, and caches of this dtype."""
    stored = helper.np_dtype_to_tensor_dtype(np.dtype(cache))
    return {name: stored if "present" in name else TensorProto.FLOAT for name in names}


def runtime_of(model: onnx.ModelProto, library: Path | None = None) -> Any:
    """The model in ONNX Runtime, by its definitions, or with the operators of a library."""
    options = onnxruntime.SessionOptions()
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def oracle_of(model: onnx.ModelProto) -> ReferenceEvaluator:
    """The model in numpy."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.functions[:]
    return ReferenceEvaluator(bare, new_ops=[TaskKVAttention, FullKVAttention])


def assert_equal(found: Sequence[Any], expected: Sequence[Any], used: Sequence[int]) -> None:
    """Outputs are equal, caches (in pairs) as far as they are used; with float16 caches to a few units of theirs."""
    close = {"rtol": 4e-3, "atol": 4e-3} if found[1].dtype == np.float16 else {"rtol": 1e-4, "atol": 2e-5}
    lengths = [None, *(length for length in used for _ in "kv")]
    for mine, its, length in zip(found, expected, lengths, strict=True):
        part = (slice(None),) * 2 + (slice(length),) if length is not None else ()
        np.testing.assert_allclose(mine[part], its[part], **close)
