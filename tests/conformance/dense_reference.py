"""The reference of the conformance tests: stock eager attention of transformers under a per-head float mask.

It shares no code with thinkkv. The whole sequence runs at once, without a cache, in float32 whatever the tested
model's dtype; a hook on every attention module puts the layer's own [B, Hq, T, T] mask in place of the causal one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.conformance.decoding import positions
from tests.tiny_models import Batch

Kept = Sequence[Sequence[Sequence[Sequence[int]]]]
"""[layer][sequence][KV head] -> kept prompt positions, padding not counted."""

Stored = Sequence[Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]]]
"""[layer][sequence][KV head] -> [kept, D] keys and [kept, D] values that are stored there."""


class DenseReference:
    """A float32 twin of a model.

    Args:
        model: an unpatched model; it is copied.
        windows: sliding window of each layer, None for full attention.
    """

    def __init__(self, model: Any, windows: Sequence[int | None]) -> None:
        self._model = copy.deepcopy(model).float().eval()
        self._model.set_attn_implementation("eager")
        self._windows = windows

    @torch.inference_mode()
    def logits(self, batch: Batch, kept: Kept | None, *, prompt: int) -> torch.Tensor:
        """Logits from the prompt's last column on.

        Args:
            batch: prompts and what follows.
            kept: what each KV head keeps of the prompt; None for everything.
            prompt: columns of the prompt.

        Returns:
            [B, T - prompt + 1, vocabulary] float32.
        """
        hooks = [
            layer.self_attn.register_forward_pre_hook(
                _mask_setter(self._layer_mask(index, batch, None if kept is None else kept[index], prompt)),
                with_kwargs=True,
            )
            for index, layer in enumerate(self._model.model.layers)
        ]
        try:
            out = self._model(batch.ids, attention_mask=batch.mask, position_ids=positions(batch.mask), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return out.logits[:, prompt - 1 :]

    def _layer_mask(
        self, layer: int, batch: Batch, kept: Sequence[Sequence[Sequence[int]]] | None, prompt: int
    ) -> torch.Tensor:
        """[B, Hq, T, T] float32: 0 where a query sees a key, the lowest number elsewhere."""
        config = self._model.config
        group = config.num_attention_heads // config.num_key_value_heads
        seen = np.array(
            [
                [
                    _visible(real, prompt, self._windows[layer], kept[sequence][head] if kept else None)
                    for head in range(config.num_key_value_heads)
                ]
                for sequence, real in enumerate(batch.mask.bool().numpy())
            ]
        )
        return torch.from_numpy(np.where(seen.repeat(group, axis=1), np.float32(0), np.finfo(np.float32).min))


def _visible(real: np.ndarray, prompt: int, window: int | None, kept: Sequence[int] | None) -> np.ndarray:
    """[T, T] bool: what each column of one sequence sees in one head."""
    position = np.cumsum(real) - 1
    age = position[:, None] - position[None, :]
    seen = real[None, :] & (age >= 0)
    if window is not None:
        seen &= age < window
    if kept is not None:
        column = np.arange(len(real))
        evicted = (column < prompt) & ~np.isin(position, kept)
        seen &= ~(evicted[None, :] & (column >= prompt)[:, None])
    return seen


def _mask_setter(mask: torch.Tensor) -> Any:
    def set_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": mask}

    return set_mask
