"""Column means of the observation window's attention (Task-KV eq. 12-13, SnapKV's voting), in plain torch."""

from __future__ import annotations

import torch


def window_scores(queries: torch.Tensor, keys: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Mean attention that the last queries of a prompt give to each of its tokens.

    Args:
        queries: [Hq, L, D], the last L queries of the prompt, rotated like the keys.
        keys: [n, N, D] with N >= L; query head h reads KV head ``h // (Hq / n)``.
        scale: softmax scale, usually ``D ** -0.5``.

    Returns:
        [Hq, N] float32; every row sums to 1. ``A' = softmax(Q[-L:] K^T * scale + causal mask)``, mean over L.
    """
    query_heads, window, _ = queries.shape
    kv_heads, tokens, _ = keys.shape
    group = query_heads // kv_heads
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    scores = torch.empty(query_heads, tokens, dtype=torch.float32, device=keys.device)
    # One KV head at a time: [Hq, L, N] in float32 would rival the layer's whole cache at long prompts.
    for head in range(kv_heads):
        mine = slice(head * group, (head + 1) * group)
        logits = torch.matmul(queries[mine].float() * scale, keys[head].float().T)
        logits[:, :, tokens - window :].masked_fill_(future, float("-inf"))
        scores[mine] = torch.softmax(logits, dim=-1).mean(dim=1)
    return scores
