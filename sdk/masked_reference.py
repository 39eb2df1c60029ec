"""An independent check of a compressed cache: dense attention in float64 under a boolean keep-mask.

It shares no code with the store. The whole sequence runs at once; prompt queries see everything before them, later
queries see only what the keep-plan left in their KV head, and each other causally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "thinkkv_masked_reference"

Kept = Sequence[Sequence[Sequence[Sequence[int]]]]
"""[layer][sequence][KV head] -> prompt positions kept, counted without padding."""

Stored = Sequence[Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]]
"""[layer][sequence][KV head] -> [kept, D] keys and [kept, D] values that are stored there."""


@torch.inference_mode()
def masked_logits(
    model: Any,
    ids: torch.Tensor,
    kept: Kept,
    *,
    prompt: int,
    real: torch.Tensor | None = None,
    entries: Stored | None = None,
) -> torch.Tensor:
    """Logits of the last prompt token and of everything after it, as a compressed cache should give them.

    Args:
        model: an unpatched model.
        ids: [B, T], prompts (left-padded to the same length) and what follows.
        kept: what each KV head keeps of the prompt.
        prompt: columns of the prompt.
        real: [B, T] bool, False at padding.
        entries: that tokens after the prompt see in place of its own.

    Returns:
        [B, T - prompt + 1, vocabulary].
    """
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        out = model(
            ids,
            attention_mask=real.long(),
            position_ids=(real.long().cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            thinkkv_kept=kept,
            thinkkv_real=real,
            thinkkv_prompt=prompt,
            thinkkv_entries=entries,
        )
    finally:
        model.set_attn_implementation(previous)
    return out.logits[:, prompt - 1 :]


def visible(kept: Sequence[Sequence[int]], real: torch.Tensor, prompt: int, window: int | None) -> torch.Tensor:
    """[n, T, T] bool: what each query of one sequence sees in each KV head."""
    length = len(real)
    position = real.long().cumsum(0) - 1
    age = position[:, None] - position[None, :]
    seen = (age >= 0) & real[None, :] & real[:, None]
    if window is not None:
        seen &= age < window
    after = torch.arange(length) >= prompt
    heads = []
    for positions in kept:
        remains = after | torch.isin(position, torch.tensor(list(positions), dtype=torch.long)) & ~after
        heads.append(seen & (~after[:, None] | remains[None, :]))
    return torch.stack(heads)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    sliding_window: int | None = None,
    thinkkv_kept: Kept = (),
    thinkkv_real: torch.Tensor | None = None,
    thinkkv_prompt: int = 0,
    thinkkv_entries: Stored | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    assert thinkkv_real is not None
    out = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    exact = later = (key.double(), value.double())
    if thinkkv_entries is not None:
        later = _with_stored(*exact, thinkkv_kept[layer], thinkkv_entries[layer], thinkkv_real)
    for sequence in range(query.shape[0]):
        kept = thinkkv_kept[layer][sequence]
        mask = visible(kept, thinkkv_real[sequence].cpu(), thinkkv_prompt, sliding_window).to(query.device)
        for head in range(query.shape[1]):
            own = head // group
            for rows, (keys, values) in ((slice(thinkkv_prompt), exact), (slice(thinkkv_prompt, None), later)):
                logits = query[sequence, head, rows].double() @ keys[sequence, own].T * scale
                weights = torch.softmax(logits.masked_fill(~mask[own, rows], float("-inf")), dim=-1).nan_to_num(0.0)
                out[sequence, head, rows] = (weights @ values[sequence, own]).to(query.dtype)
    return out.transpose(1, 2).contiguous(), None


def _with_stored(
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: Sequence[Sequence[Sequence[int]]],
    stored: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]],
    real: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, n, T, D] of one layer each, the stored entries in the places of the kept tokens."""
    keys, values = keys.clone(), values.clone()
    for sequence, columns in enumerate(row.nonzero()[:, 0] for row in real):
        for head, positions in enumerate(kept[sequence]):
            places = columns[list(positions)]
            keys[sequence, head, places], values[sequence, head, places] = (
                states.to(keys.dtype) for states in stored[sequence][head]
            )
    return keys, values
