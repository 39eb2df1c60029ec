"""Which KV heads does an answer need? Backward elimination by the gradient of the answer's loss. Our own score.

A fact is hidden in a text; then its question is asked and its answer scored. Later tokens see the text through a gate
per KV head, ``out = g A(everything) + (1 - g) A(sinks and recent tokens)`` (DuoAttention's gate, arXiv:2410.10819):
what an other head of ``retrieval-kv`` is left with. ``-dL/dg`` says what a head's whole cache is worth to the answer
next to all others that are still there. The heads worth least are closed, a quarter at a time, until none is left; the
later a head goes, the more it is needed. Heads that replace one another are thus not thrown away together, as they
are when every head is judged alone, nor kept together, as by the attention that they pay to the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.evaluating import evaluating, read
from thinkkv.sdk.hidden_facts import HiddenFact
from thinkkv.sdk.holding import HoldingLayer
from thinkkv.sdk.patching import apply
from thinkkv.sdk.policies import RetrievalKV

CLOSED_AT_ONCE = 0.25
"""Share of the open heads that are closed before all are judged anew."""

GATES = (0.5, 1.0)
"""How far the open heads are open when they are judged: fully, where one alone may change nothing, and half."""

Progress = Callable[[Iterable[Any]], Iterable[Any]]


class _GatedLayer(HoldingLayer):
    """Holds a whole prompt; tokens after it see it through the gates and are not stored."""

    gates: torch.Tensor
    """[n], 0 to 1."""

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: Any) -> torch.Tensor:
        if self.held is None:
            return super().attend(query, keys, values, **options)
        keys, values = torch.cat([self.held.keys, keys], dim=2), torch.cat([self.held.values, values], dim=2)
        visible, ends = self._visible(keys.shape[2], query), self._ends(keys.shape[2], query)

        def attention(entries: Any) -> torch.Tensor:
            return scaled_dot_product_attention(
                query,
                keys[:, :, entries],
                values[:, :, entries],
                attn_mask=visible[:, entries],
                scale=options["scale"],
                enable_gqa=True,
            )

        gates = self.gates.to(query).repeat_interleave(self.shape.query_group)[:, None, None]
        return torch.lerp(attention(ends), attention(slice(None)), gates)

    def _visible(self, tokens: int, query: torch.Tensor) -> torch.Tensor:
        """[Q, T] bool: what each new token sees."""
        positions = torch.arange(tokens, device=query.device)
        age = positions[tokens - query.shape[2] :, None] - positions
        return (age >= 0) & (age < (self.shape.window or tokens))

    def _ends(self, tokens: int, query: torch.Tensor) -> torch.Tensor:
        """Entries that a closed head still has: sinks, recent tokens of the prompt, and what came after it."""
        recent = max(RetrievalKV.sinks, tokens - query.shape[2] - RetrievalKV.recent)
        positions = torch.arange(tokens, device=query.device)
        return positions[(positions < RetrievalKV.sinks) | (positions >= recent)]


@dataclass(frozen=True)
class Question:
    """A fact whose text has been read: every loss of its answer starts from the same cache."""

    model: Any
    fact: HiddenFact
    cache: HeterogeneousCache

    @classmethod
    def read(cls, model: Any, fact: HiddenFact, compression: Compression) -> Question:
        cache = HeterogeneousCache(compression)
        cache.layers = [_GatedLayer(index, compression) for index in range(len(compression.shapes))]
        with torch.no_grad():
            read(model, fact.prompt, cache)
        return cls(model, fact, cache)

    def loss(self, gates: torch.Tensor) -> torch.Tensor:
        """Mean negative log-likelihood of the answer's tokens, nats, with gates [layers, n]."""
        for layer, own in zip(self.cache.layers, gates, strict=True):
            assert isinstance(layer, _GatedLayer)
            layer.gates = own
        logits = read(self.model, self.fact.asked, self.cache, keep=self.fact.answer_tokens + 1)
        answer = torch.tensor(self.fact.asked[-self.fact.answer_tokens :], device=logits.device)
        return cross_entropy(logits[:-1].float(), answer)

    def worth(self, gates: torch.Tensor) -> torch.Tensor:
        """[layers, n]: by how much the loss falls per unit that a gate opens, at these gates."""
        gates = gates.requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(gates), gates)
        return -gradient


def elimination_ranks(model: nn.Module, facts: Sequence[HiddenFact], progress: Progress = iter) -> list[list[float]]:
    """Rank all KV heads of a model by when they are eliminated.

    Args:
        model: a supported model that is not patched.
        facts: what is asked.
        progress: wraps the iteration over rounds, for a progress bar.

    Returns:
        [layers][KV heads]: place in the order of elimination, from just above 0 to 1 for the last.
    """
    # Gradients are needed whatever surrounds the call.
    with torch.inference_mode(False), torch.enable_grad(), apply(model, policy="full") as handle, evaluating(model):
        questions = [Question.read(model, fact, handle.compression) for fact in facts]
        layers, heads = len(handle.shapes), handle.shapes[0].kv_heads
        order: list[int] = []
        for closing in progress(list(rounds(layers * heads))):
            open_heads = torch.ones(layers * heads).index_fill(0, torch.tensor(order, dtype=torch.int64), 0)
            gates = open_heads.view(layers, heads)
            worth = torch.stack([question.worth(at * gates) for question in questions for at in GATES]).sum(dim=0)
            worth = worth.flatten().masked_fill(open_heads == 0, float("inf"))
            order += worth.argsort(stable=True)[:closing].tolist()
    ranks = torch.empty(layers * heads).index_copy(0, torch.tensor(order), torch.arange(1.0, layers * heads + 1))
    return (ranks / (layers * heads)).view(layers, heads).tolist()


def rounds(heads: int) -> Iterator[int]:
    """How many heads each round closes."""
    while heads:
        closing = max(1, int(heads * CLOSED_AT_ONCE))
        yield closing
        heads -= closing
