"""A model that is used and not trained: in evaluation mode for a while, and prompts read into a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards in the mode of before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def read(model: Any, ids: Sequence[int], cache: Any, *, keep: int = 1) -> torch.Tensor:
    """Let a model read tokens into a cache.

    Args:
        model: a causal LM.
        ids: of one sequence; they follow what the cache has seen.
        cache: of the model.
        keep: how many of the last logits to compute.

    Returns:
        [keep, vocabulary].
    """
    device = model.get_input_embeddings().weight.device
    out = model(torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits: torch.Tensor = out.logits[0]
    return logits
