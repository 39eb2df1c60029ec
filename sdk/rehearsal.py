"""Read a prompt a second time, and note the attention that each cached token gets: what reading it needs. KVzip.

A model that reads a text again, with the first reading in its cache, looks up nearly every token there before it comes.
Whatever may be asked later needs the same look-ups, so this tells what to keep without any question (KVzip,
arXiv:2505.23416, which also writes a prompt that asks for the repetition; here the text alone is repeated). It is read
in chunks, each after the whole first reading and with the positions that would follow it, so that activations stay as
small as a chunk and no position is much beyond the prompt's.

What is chosen by these look-ups weighs more for them than for what comes later: the tokens that they pass over are
looked at twice as much by questions. So a policy may ask for a few tokens more, in random order, which find no copy of
what is before them, as a question does not, and choose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from thinkkv.sdk.products import products_of
from thinkkv.sdk.whole_prompt import WholePrompt

if TYPE_CHECKING:
    from thinkkv.sdk.holding import HoldingLayer

CHUNK = 2048
"""Tokens read again at once, as in the paper. Shorter chunks choose worse: where one begins, the model does not know
yet where in the text it is, and looks everywhere."""

LEAD_IN = 64
"""Tokens before a chunk that are read with it for that reason; their attention is not counted a second time."""

QUERIES = 128
"""Queries of each query head whose attention to everything is in memory at once; many more leave a CPU's caches."""

SHUFFLED = 256
"""Tokens that are read in random order."""


@dataclass(frozen=True)
class Chunk:
    """A part of the prompts that is being read again.

    Args:
        counted_from: the first of its tokens whose attention counts.
        held_queries: of the queries of a whole second reading, so many are held of each KV head.
        shuffled: all its queries are held, as those of tokens in random order.
    """

    counted_from: int
    held_queries: int = 0
    shuffled: bool = False


@torch.no_grad()
def rehearse(
    decoder: Any, inputs: Mapping[str, Any], cache: Any, *, held_queries: int = 0, shuffled: bool = False
) -> None:
    """Read prompts again whose cache is held by HoldingLayers, which note it.

    Args:
        decoder: the transformers decoder; only its forward is called, no hook of it.
        inputs: what it was given: ``input_ids`` or ``inputs_embeds`` [B, N, ...], ``attention_mask`` [B, N] or None.
        cache: a HeterogeneousCache that holds the prompts.
        held_queries: of each KV head, to be held besides.
        shuffled: read some of their tokens once more, in random order, and hold all queries of these.
    """
    name = "input_ids" if inputs.get("input_ids") is not None else "inputs_embeds"
    tokens, mask = inputs[name], inputs.get("attention_mask")
    real = tokens.new_ones(tokens.shape[:2], dtype=torch.int64) if mask is None else mask.to(torch.int64)
    lengths = real.sum(dim=1, keepdim=True)
    # Real tokens first, so that a row is cut into the same chunks however it is padded.
    order = real.argsort(dim=1, descending=True, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    tokens, real = tokens[rows, order], real.gather(1, order)

    def read(tokens: torch.Tensor, real: torch.Tensor, chunk: Chunk) -> None:
        with _rehearsing(cache.layers, chunk):
            decoder.forward(
                **{name: tokens},
                attention_mask=None if mask is None else torch.cat([mask, real.to(mask)], dim=1),
                position_ids=(lengths + real.cumsum(dim=1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
            )

    for start in range(0, int(lengths.max()), CHUNK):
        part = slice(max(0, start - LEAD_IN), start + CHUNK)
        read(tokens[:, part], real[:, part], Chunk(start - part.start, held_queries))
    if shuffled:
        drawn = _drawn(lengths)
        read(tokens[rows, drawn], torch.ones_like(drawn), Chunk(counted_from=SHUFFLED, shuffled=True))


def _drawn(lengths: torch.Tensor) -> torch.Tensor:
    """[B, SHUFFLED] int64 tokens of prompts of [B, 1] lengths; of a prompt the same in whatever batch it stands."""
    part = torch.rand(SHUFFLED, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (part * lengths.cpu()).long().to(lengths.device)


@contextmanager
def _rehearsing(layers: Sequence[HoldingLayer], chunk: Chunk) -> Iterator[None]:
    for layer in layers:
        layer.chunk = chunk
    try:
        yield
    finally:
        for layer in layers:
            layer.chunk = None


def attend_again(
    prompt: WholePrompt,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    real: torch.Tensor | None = None,
    window: int | None = None,
    counted_from: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of tokens that follow held prompts, to these and to one another.

    Args:
        prompt: N tokens of B sequences.
        query: [B, Hq, Q, D].
        keys, values: [B, n, Q, D].
        real: [B, Q] bool, False at padding; None where there is none.
        window: each token sees itself and the ``window - 1`` before it.
        counted_from: the first real token of each sequence whose attention counts.

    Returns:
        [B, Hq, Q, D], zeros at padding; [B, n, N] float32: the most that any of the counted queries attends to each
        token of the prompt, 0 at padding; and all that they attend to it together.
    """
    group = query.shape[1] // keys.shape[1]
    new = WholePrompt(query, keys, values, prompt.scale, real)
    out = torch.zeros_like(query)
    most, total = torch.zeros(2, *prompt.keys.shape[:3], dtype=torch.float32, device=query.device)
    for sequence, (old, mine) in enumerate(zip(prompt.columns, new.columns, strict=True)):
        for head in range(keys.shape[1]):
            queries = slice(head * group, (head + 1) * group)
            pairs = ((prompt.keys, keys), (prompt.values, values))
            both = [torch.cat([a[sequence, head, old], b[sequence, head, mine]]).float() for a, b in pairs]
            own = query[sequence, queries][:, mine].float()
            with products_of(query.dtype):
                attended, *noted = _attend(own, both[0], both[1], prompt.scale, window, counted_from)
            out[sequence, queries, mine] = attended.to(out.dtype)
            most[sequence, head, old], total[sequence, head, old] = noted
    return out, most, total


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int | None, counted_from: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[G, Q, D] attention of the last Q of T tokens, causal, in the window; [T - Q] the most and all of the counted.

    Attention of the Q tokens to one another is not noted.
    """
    group, length, dim = query.shape
    before = len(keys) - length
    out = torch.empty_like(query)
    most, total = torch.zeros(2, before, device=keys.device)
    # Asked for once: of all that a block costs, memory that is new to the process is a good part.
    room = keys.new_empty(2, group * min(QUERIES, length) * len(keys))
    for start in range(0, length, QUERIES):
        block = query[:, start : start + QUERIES]
        new = block.shape[1]
        seen = before + start + new
        scores, weights = room[:, : group * new * seen].view(2, group, new, seen)
        logits = scores.view(-1, seen)
        # Scaled afterwards: of the products, the factors may be rounded.
        torch.addmm(logits, block.reshape(-1, dim), keys[:seen].T, beta=0, alpha=scale, out=logits)
        ahead = torch.ones(new, new, dtype=torch.bool, device=keys.device).triu(1)
        scores[:, :, seen - new :].masked_fill_(ahead, float("-inf"))
        if window is not None:
            position = torch.arange(seen, device=keys.device)
            scores.masked_fill_(position[-new:, None] - position >= window, float("-inf"))
        torch.softmax(scores, dim=-1, out=weights)
        out[:, start : start + new] = weights @ values[:seen]
        counted = weights[:, max(0, counted_from - start) :, :before]
        if counted.shape[1]:
            most = torch.maximum(most, counted.amax(dim=(0, 1)))
            total += counted.sum(dim=(0, 1))
    return out, most, total
