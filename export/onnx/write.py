"""Write a baked model as an ONNX bundle: the stock builder's graph, rewritten."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from thinkkv.export.bake import Baked
from thinkkv.export.onnx.builder import Quantize, build_dense, check_installed
from thinkkv.export.onnx.generate import GENAI_FILE
from thinkkv.export.onnx.native import LIBRARY_FILE, check_native, write_library
from thinkkv.export.onnx.options import OnnxOptions
from thinkkv.export.onnx.session import GRAPH_FILE
from thinkkv.export.onnx.slots import GENAI_SLACK, Slots
from thinkkv.export.safetensors import write_checkpoint
from thinkkv.export.staging import write_json
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.block import BLOCK_FILE, Block


def write_onnx(baked: Baked, folder: Path, *, quantize: Quantize = "none", options: OnnxOptions | None = None) -> None:
    """Graph, data file, ``genai_config.json``, tokenizer and ``thinkkv.json``.

    Args:
        baked: what ``bake`` returned.
        folder: an existing folder.
        quantize: weight-only quantization by the builder.
        options: what the bundle is for; a plain one for CPUs by default.

    Raises:
        ExportError: the model cannot be expressed, the builder failed, or operators in C cannot be compiled.
        MissingExtraError: the ``export`` extra is not installed.
    """
    options = options or OnnxOptions()
    check_installed()
    _refuse_windows(baked.block)
    if options.native:
        check_native(baked.block.layers)
        write_library(folder)
    slots = slots_of(baked.block)
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint.") as checkpoint:
        write_checkpoint(baked, Path(checkpoint))
        build_dense(Path(checkpoint), folder, quantize=quantize, options=options)
    bounded = _rewrite_graph(folder / GRAPH_FILE, baked.block, slots, options)
    _adapt_genai(folder / GENAI_FILE, slots, bounded, options)
    runtime = vars(options) | {"quantize": quantize, "slots": vars(slots) if slots else None}
    write_json(folder / BLOCK_FILE, baked.block.as_json() | {"onnx": runtime})


def slots_of(block: Block) -> Slots | None:
    """What the bounded heads of a bundle keep; None where every head is full."""
    return Slots.of(block) if any(layer.full < layer.kv_heads for layer in block.layers) else None


def _rewrite_graph(path: Path, block: Block, slots: Slots | None, options: OnnxOptions) -> list[int]:
    import onnx  # part of the export extra

    from thinkkv.export.onnx.rewrite import rewrite

    model = onnx.load(path, load_external_data=False)  # the weights stay where they are, in the data file
    cache_type = onnx.TensorProto.FLOAT16 if options.half else None
    caches = rewrite(model, block.layers, slots, on_cpu=options.on_cpu, cache_type=cache_type)
    onnx.save(model, path)
    return caches.bounded_numbers


def _adapt_genai(path: Path, slots: Slots | None, bounded: list[int], options: OnnxOptions) -> None:
    """Tell onnxruntime-genai which caches are bounded: it sizes them at the window plus its slack."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    session_options = config["model"]["decoder"]["session_options"]
    if options.native:
        session_options["custom_ops_library"] = LIBRARY_FILE
    if slots is not None:
        # Every branch of every layer would look for a pattern of its own in each step, and seldom find it.
        session_options["enable_mem_pattern"] = False
        # A step allocates some hundred small buffers, which the C library does sooner than the runtime's own arena.
        session_options["enable_cpu_mem_arena"] = False
        config["model"]["decoder"]["sliding_window"] = {
            "window_size": slots.capacity - (GENAI_SLACK if options.on_cpu else 0),
            "slide_key_value_cache": False,
            "slide_inputs": False,
            "layers": bounded,
        }
    write_json(path, config)


def _refuse_windows(block: Block) -> None:
    windowed = [layer.window for layer in block.layers if layer.window is not None]
    if windowed:
        raise ExportError(
            f"{len(windowed)} of {len(block.layers)} layers have a sliding window of {windowed[0]} tokens, which ONNX "
            "bundles do not have yet - use --format safetensors"
        )
