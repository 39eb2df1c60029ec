"""Feed a model chunk by chunk, with the mask and the positions that ``generate`` would pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.tiny_models import VOCABULARY, Batch


class Conversation:
    """One cache being filled.

    Args:
        model: patched or not.
        cache: None lets the model make its own.
    """

    def __init__(self, model: Any, cache: Any = None) -> None:
        self.cache = cache
        self._model = model
        self._mask = torch.zeros(0, 0)

    @torch.inference_mode()
    def feed(self, chunk: Batch) -> torch.Tensor:
        """[B, Q, vocabulary] logits of the next tokens."""
        self._mask = torch.cat([self._mask, chunk.mask], dim=1) if self._mask.numel() else chunk.mask
        out = self._model(
            chunk.ids,
            attention_mask=self._mask,
            position_ids=positions(self._mask)[:, -chunk.ids.shape[1] :],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        return out.logits

    def feed_all(self, chunks: Sequence[Batch]) -> torch.Tensor:
        """[B, all tokens, vocabulary] logits of several chunks, one after the other."""
        return torch.cat([self.feed(chunk) for chunk in chunks], dim=1)

    def on(self, cache: Any) -> Conversation:
        """The same conversation, which goes on with another cache."""
        other = Conversation(self._model, cache)
        other._mask = self._mask.clone()
        return other

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens."""
        self.cache.crop(-tokens)
        self._mask = self._mask[:, : self._mask.shape[1] - tokens]


def decoded(model: Any, prompt: Batch, following: Sequence[Batch]) -> torch.Tensor:
    """[B, 1 + tokens of ``following``, vocabulary] logits from the prompt's last token on."""
    conversation = Conversation(model)
    last = conversation.feed(prompt)[:, -1:]
    return torch.cat([last, conversation.feed_all(following)], dim=1)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """[B, T] position of every token, padding not counted."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def joined(chunks: Sequence[Batch]) -> Batch:
    """All chunks as one batch."""
    return Batch(torch.cat([c.ids for c in chunks], dim=1), torch.cat([c.mask for c in chunks], dim=1))


def random_chunk(lengths: Sequence[int], *, width: int | None = None, seed: int = 0) -> Batch:
    """Random tokens of several sequences, left-padded to ``width`` (default: the longest)."""
    width = max(lengths) if width is None else width
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return Batch(torch.randint(1, VOCABULARY, mask.shape, generator=draw) * mask, mask)


def random_tokens(rows: int, steps: int, *, seed: int = 0) -> list[Batch]:
    """Random tokens for ``steps`` decode steps."""
    return in_steps(random_chunk((steps,) * rows, seed=seed).ids)


def in_steps(ids: torch.Tensor) -> list[Batch]:
    """[B, S] tokens as S decode steps."""
    return [Batch(column, torch.ones_like(column)) for column in ids.split(1, dim=1)]
