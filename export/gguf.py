"""Write a baked model as one GGUF file that stock llama.cpp loads; there every head keeps the full cache.

The head classes stand in ``thinkkv.*`` keys as JSON text, for an engine that knows what to do with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from thinkkv.export.bake import Baked
from thinkkv.export.gguf_tokenizer import write_tokenizer
from thinkkv.export.onnx.builder import Quantize
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.extras import require

FAMILIES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""``model_type`` to llama.cpp's architecture."""


def write_gguf(baked: Baked, path: Path, *, quantize: Quantize = "none") -> None:
    """Weights, tokenizer, chat template and ``thinkkv.*`` keys.

    Args:
        baked: what ``bake`` returned.
        path: of the file.
        quantize: ``none`` writes float16, ``int8`` q8_0, ``int4`` q4_0.

    Raises:
        ExportError: llama.cpp has no such architecture, rotary scaling or tokenizer.
        MissingExtraError: the package gguf is not installed.
    """
    require(("gguf",), extra="export", purpose="GGUF export")
    import gguf

    config = baked.model.config
    if config.model_type not in FAMILIES:
        raise ExportError(
            f"GGUF export knows {', '.join(FAMILIES)}, not {config.model_type} - use --format safetensors"
        )
    architecture = gguf.MODEL_ARCH[FAMILIES[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_geometry(writer, baked, quantize)
    write_tokenizer(writer, baked)
    _write_classes(writer, baked)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    interleaved = architecture == gguf.MODEL_ARCH.LLAMA
    for name, tensor in _tensors(baked.model, interleaved).items():
        target = (
            "rope_freqs.weight" if name == "rope_freqs" else names.get_name(name, try_suffixes=(".weight", ".bias"))
        )
        if target is None:
            raise ExportError(f"llama.cpp has no place for {name} - use --format safetensors")
        _write_tensor(writer, target, tensor, quantize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_geometry(writer: Any, baked: Baked, quantize: Quantize) -> None:
    import gguf

    config, layer = baked.model.config, baked.block.layers[0]
    file_types = {"none": "MOSTLY_F16", "int8": "MOSTLY_Q8_0", "int4": "MOSTLY_Q4_0"}
    writer.add_name(baked.block.source["label"] or config.model_type)
    writer.add_file_type(gguf.LlamaFileType[file_types[quantize]])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(layer.query_heads)
    writer.add_head_count_kv(layer.kv_heads)
    writer.add_key_length(layer.head_dim)
    writer.add_value_length(layer.head_dim)
    writer.add_rope_dimension_count(layer.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope: Mapping[str, Any] = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] not in ("default", "llama3"):  # llama3's factors are a tensor, see _tensors
        raise ExportError(f"GGUF export does not know rotary scaling {rope['rope_type']!r} - use --format safetensors")
    if config.model_type == "qwen2" and layer.query_heads * layer.head_dim != config.hidden_size:
        raise ExportError("llama.cpp's Qwen2 wants heads that fill the hidden size - use --format safetensors")
    if any(each.window is not None for each in baked.block.layers):
        raise ExportError("GGUF export does not know sliding windows - use --format safetensors")


def _tensors(model: Any, interleaved: bool) -> dict[str, torch.Tensor]:
    """Weights by Hugging Face name, in llama.cpp's order of the rotary halves."""
    config = model.config
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if interleaved:
        counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for name, tensor in tensors.items():
            heads = next((count for part, count in counts.items() if f".{part}." in name), None)
            if heads is not None:
                # Halves (re re .. im im) become pairs (re im re im ..) inside each head.
                tensors[name] = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if config.rope_parameters["rope_type"] == "llama3":
        frequencies = model.model.rotary_emb.inv_freq.float().cpu()
        dim, theta = 2 * len(frequencies), config.rope_parameters["rope_theta"]
        unscaled = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        tensors["rope_freqs"] = unscaled / frequencies
    return tensors


def _write_tensor(writer: Any, name: str, tensor: torch.Tensor, quantize: Quantize) -> None:
    import gguf

    array = tensor.detach().float().cpu().contiguous().numpy()
    kinds = gguf.GGMLQuantizationType
    kind = {"none": kinds.F16, "int8": kinds.Q8_0, "int4": kinds.Q4_0}[quantize]
    if quantize == "int4" and name in ("token_embd.weight", "output.weight"):
        kind = kinds.Q8_0  # the vocabulary suffers most from four bits
    if array.ndim == 1:
        kind = kinds.F32
    elif array.shape[-1] % 32:
        kind = kinds.F16  # no whole block of 32
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_shape=None, raw_dtype=kind)


def _write_classes(writer: Any, baked: Baked) -> None:
    block = baked.block
    budget = {"ratio": block.ratio, "tokens": block.budget, "context": block.context, "kept": block.kept}
    writer.add_string("thinkkv.version", block.version)
    writer.add_string("thinkkv.policy", json.dumps({"name": block.policy, **block.options}))
    writer.add_string("thinkkv.heterogeneous", json.dumps(block.heterogeneous))
    writer.add_string("thinkkv.budget", json.dumps(budget))
