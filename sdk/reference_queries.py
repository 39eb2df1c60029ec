"""Reference queries: what each of them gets from all tokens of one KV head.

What is stored in place of the tokens is good where such queries get from it what they got from these (Attention
Matching, arXiv:2602.16284). Values (``matched_values.py``) are fitted to those of a second reading, summaries
(``summaries.py``) to those of tokens in random order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

ROWS = 1024
"""Queries whose attention is in memory at once."""


@dataclass(frozen=True)
class ReferenceQueries:
    """Queries of one KV head, and their attention to everything.

    Args:
        scaled: [R, D] float32, times the softmax scale.
        weighed: [R] float32, what all tokens weigh: the logarithm of the sum of the exponentials of their logits.
        outputs: [R, D] float32, attention to all tokens.
    """

    scaled: torch.Tensor
    weighed: torch.Tensor
    outputs: torch.Tensor

    @classmethod
    def of(cls, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> ReferenceQueries:
        """From queries [R, D] and all keys and values [N, D]."""
        scaled, keys, values = queries.float() * scale, keys.float(), values.float()
        parts = [_attention(part, keys, values) for part in scaled.split(ROWS)]
        weighed, outputs = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(scaled, weighed, outputs)

    def parts(self) -> Iterator[ReferenceQueries]:
        """The same, ``ROWS`` at a time."""
        columns = (self.scaled.split(ROWS), self.weighed.split(ROWS), self.outputs.split(ROWS))
        return (ReferenceQueries(*part) for part in zip(*columns, strict=True))


def _attention(scaled: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one part: what all tokens weigh, and attention to them; each logit is exponentiated once, in its place."""
    scores = scaled @ keys.T
    top = scores.amax(dim=1, keepdim=True)
    total = scores.sub_(top).exp_().sum(dim=1, keepdim=True)
    return (top + total.log())[:, 0], (scores @ values) / total
