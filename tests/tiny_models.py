"""Tiny random models of every supported family, and prompts for them, by one seed.

The weights are large enough for peaked attention: greedy tokens do not hang on rounding, and a token that a cache
lost changes the logits.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SEED = int(os.environ.get("THINKKV_TEST_SEED", "1"))
QUERY_HEADS = 8
KV_HEADS = (8, 4, 2, 1)
"""Multi-head attention, and query groups of 2, 4 and 8."""

LAYERS = 3
HEAD_DIM = 16
VOCABULARY = 97
WINDOW = 24
"""Sliding window of the variants that have one, tokens."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": QUERY_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MIXED = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

VARIANTS: Mapping[str, Callable[..., PretrainedConfig]] = {
    "llama": LlamaConfig,
    "llama3": lambda **sizes: LlamaConfig(rope_parameters=_LLAMA_3, **sizes),
    "qwen2": Qwen2Config,
    "qwen2-mixed": lambda **sizes: Qwen2Config(**_MIXED, **sizes),
    "qwen3": Qwen3Config,
    "qwen3-mixed": lambda **sizes: Qwen3Config(**_MIXED, **sizes),
    "mistral": lambda **sizes: MistralConfig(sliding_window=None, **sizes),
    "mistral-window": lambda **sizes: MistralConfig(sliding_window=WINDOW, **sizes),
}
"""Families by name: ``mixed`` alternates sliding and full layers, ``window`` slides in all of them."""


def windows(variant: str) -> list[int | None]:
    """Sliding window of each layer, None for full attention."""
    if variant.endswith("-mixed"):
        return [WINDOW, None, WINDOW]
    return [WINDOW if variant.endswith("-window") else None] * LAYERS


PADDED = (63, 41, 22)
"""Prompt lengths of a left-padded batch; the shortest fits the sliding window."""


@dataclass(frozen=True)
class Batch:
    """Prompts left-padded to one length.

    Args:
        ids: [B, T] int64.
        mask: [B, T] int64, 0 at padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each sequence."""
        return self.mask.sum(dim=1).tolist()


@dataclass(frozen=True)
class Case:
    """One tiny model and the batch it is given."""

    variant: str
    kv_heads: int
    dtype: torch.dtype = torch.float32
    lengths: Sequence[int] = field(default=(63,))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        rows = f"N{self.lengths[0]}" if len(self.lengths) == 1 else f"padded{len(self.lengths)}"
        return f"{self.variant}-H{QUERY_HEADS}-KV{self.kv_heads}-{dtype}-{rows}"

    def model(self) -> Any:
        """The model, one instance per session: leave it as it was."""
        return tiny_model(self.variant, self.kv_heads, self.dtype)

    @property
    def windows(self) -> list[int | None]:
        """Sliding window of each layer."""
        return windows(self.variant)

    def batch(self) -> Batch:
        """Its prompts."""
        return prompts(self.lengths, label=str(self))


@cache
def tiny_model(variant: str, kv_heads: int, dtype: torch.dtype) -> Any:
    """A random model in evaluation mode; every dtype rounds the same float32 weights."""
    return new_model(variant, kv_heads, dtype)


def new_model(variant: str, kv_heads: int, dtype: torch.dtype = torch.float32) -> Any:
    """The same model in an instance of one's own."""
    config = VARIANTS[variant](**_SIZES, num_key_value_heads=kv_heads)
    with torch.random.fork_rng():
        torch.manual_seed(_seed(f"{variant}-{kv_heads}"))
        model = AutoModelForCausalLM.from_config(config)
        _sharpen_head_norms(model)
    # Parameters only, as from_pretrained does it: rotary frequencies stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def prompts(lengths: Sequence[int], *, label: str = "") -> Batch:
    """Random prompts of these lengths, left-padded with token 0."""
    draw = torch.Generator().manual_seed(_seed(f"{label}-{tuple(lengths)}"))
    ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)), generator=draw)
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return Batch(ids * mask, mask.long())


def _sharpen_head_norms(model: nn.Module) -> None:
    """Qwen3 normalises queries and keys, so that large projections alone leave its attention flat."""
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.constant_(weight, 1.5)


def _seed(label: str) -> int:
    return SEED + zlib.crc32(label.encode())


def stock_attention(model: Any, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer the stock model's attention [Hq, N, N] and its values [n, N, D], in float64."""
    values: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out[0]))
        for layer in model.model.layers
    ]
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(previous)
        for hook in hooks:
            hook.remove()
    heads = model.config.num_key_value_heads
    return [
        (attention[0].double(), value.double().unflatten(-1, (heads, -1)).transpose(0, 1))
        for attention, value in zip(out.attentions, values, strict=True)
    ]


def stock_queries(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """Per layer the rotated queries [Hq, N, D] that the stock model attends with."""
    queries: list[torch.Tensor] = []

    def note(module: nn.Module, query: torch.Tensor, *args: Any, **options: Any) -> Any:
        queries.append(query[0])
        return sdpa_attention_forward(module, query, *args, **options)

    AttentionInterface.register("noting", note)
    AttentionMaskInterface.register("noting", sdpa_mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation("noting")
    try:
        with torch.no_grad():
            model(torch.tensor([ids]), use_cache=False)
    finally:
        model.set_attn_implementation(previous)
    return queries
