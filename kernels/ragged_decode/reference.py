"""Attention of new tokens over cache rows of one length, in plain torch: the CPU path.

A layer holds a few groups of rows of equal length, so every call is dense and needs no padding mask. The query
group is laid along the query axis: one key row serves all its query heads without being repeated.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 512
"""Queries attended at once for a chunk; bounds the mask to ``group * QUERY_BLOCK * T`` booleans."""


def decode_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend ``Q`` new tokens to their rows; the rows end with these tokens.

    Args:
        query: [R, G, Q, D], G query heads per row.
        keys, values: [R, T, D] with T >= Q; the last Q entries belong to the new tokens.
        scale: softmax scale.
        visible: [R, Q, T] bool, what each query may see, where more than causality hides entries.

    Returns:
        [R, G, Q, D] in query's dtype.
    """
    if query.shape[2] == 1 and visible is None:
        # Rows as the batch, the query group as the queries: [R, 1, G, D] over [R, 1, T, D].
        folded = query.transpose(1, 2)
        out = scaled_dot_product_attention(folded, keys.unsqueeze(1), values.unsqueeze(1), scale=scale)
        return out.transpose(1, 2)
    blocks = range(0, query.shape[2], QUERY_BLOCK)
    return torch.cat([_attend_block(query, keys, values, start, scale, visible) for start in blocks], dim=2)


def _attend_block(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    scale: float,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    rows, group, new, _ = query.shape
    block = query[:, :, start : start + QUERY_BLOCK]
    width = block.shape[2]
    mask = causal_tail(new, keys.shape[1], device=keys.device)[start : start + width]
    if visible is not None:
        mask = mask & visible[:, start : start + width]
    mask = mask.expand(rows, width, -1).repeat(1, group, 1)
    folded = block.reshape(rows, group * width, -1)
    out = scaled_dot_product_attention(folded[None], keys[None], values[None], attn_mask=mask[None], scale=scale)[0]
    return out.unflatten(1, (group, width))


def causal_tail(new: int, length: int, *, device: torch.device) -> torch.Tensor:
    """[new, length] bool: query i of the last ``new`` entries sees everything up to itself."""
    return torch.ones(new, length, dtype=torch.bool, device=device).tril(length - new)
