"""The dense reference of a cache that does not store what the model computed: what follows a prompt sees other states.

They are rounded, which is written down once more here, in numpy; or entries of the prompt are those that a policy made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from tests.conformance.dense_reference import DenseReference, Kept, Stored
from tests.kernels.sylvester import sylvester
from tests.tiny_models import Batch

NAME = "stored-reference"


class StoredReference(DenseReference):
    """As DenseReference, but tokens after the prompt attend to what is stored.

    Args:
        model: an unpatched model; it is copied.
        windows: sliding window of each layer, None for full attention.
        cache_dtype: as of a policy.
    """

    def __init__(self, model: Any, windows: Sequence[int | None], cache_dtype: str = "model") -> None:
        super().__init__(model, windows)
        for layer in self._model.model.layers:
            layer.self_attn.rounded = ROUNDED[cache_dtype]
        AttentionInterface.register(NAME, _attention)
        self._model.set_attn_implementation(NAME)

    def logits(self, batch: Batch, kept: Kept | None, *, prompt: int, entries: Stored | None = None) -> torch.Tensor:
        """As of a cache of the model's own states.

        Args:
            batch, kept, prompt: the same.
            entries: stored in place of the prompt's own, rounded already.
        """
        for index, layer in enumerate(self._model.model.layers):
            layer.self_attn.prompt_columns = prompt
            layer.self_attn.replaced = _replaced(batch, kept, entries, index) if kept and entries else []
        return super().logits(batch, kept, prompt=prompt)


def _replaced(batch: Batch, kept: Kept, entries: Stored, layer: int) -> Any:
    """Of a layer: sequence, head and columns, and the keys and values that are stored there."""
    found = []
    for sequence, mask in enumerate(batch.mask.bool()):
        columns = mask.nonzero()[:, 0]
        for head, positions in enumerate(kept[layer][sequence]):
            keys, values = entries[layer][sequence][head]
            found.append((sequence, head, columns[list(positions)], keys.float(), values.float()))
    return found


def to_255_steps(states: torch.Tensor) -> torch.Tensor:
    """[..., D] float32, every row as multiples of its largest number's 127th part."""
    exact = states.numpy()
    step = np.abs(exact).max(axis=-1, keepdims=True) / np.float32(127)
    step[step == 0] = 1  # padding
    return torch.from_numpy(np.rint(exact / step) * step)


def in_steps(states: torch.Tensor, steps: int) -> torch.Tensor:
    """[..., D] float32, every row in even steps from its least number to its largest, both rounded to float16."""
    exact = states.numpy()
    least = exact.min(axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
    step = ((exact.max(axis=-1, keepdims=True) - least) / np.float32(steps)).astype(np.float16).astype(np.float32)
    step[step == 0] = 2.0**-24  # padding
    return torch.from_numpy(np.clip(np.rint((exact - least) / step), 0, steps) * step + least)


def in_steps_turned(states: torch.Tensor, steps: int) -> torch.Tensor:
    """The same of [..., D] values that a Hadamard matrix turned, turned back."""
    turn = sylvester(states.shape[-1])
    turned = in_steps((states.double() @ turn).float(), steps)
    return (turned.double() @ turn.T).float()


Rounding = Callable[[torch.Tensor], torch.Tensor]
ROUNDED: dict[str, tuple[Rounding, Rounding]] = {
    "model": (torch.clone, torch.clone),
    "int8": (to_255_steps, to_255_steps),
    "k8v5": (to_255_steps, partial(in_steps_turned, steps=31)),
    "k8v4": (to_255_steps, partial(in_steps_turned, steps=15)),
}
"""Of keys and of values."""


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, None]:
    """[B, T, Hq, D]: columns of the prompt over exact states, the others over stored ones."""
    outputs = []
    of_keys, of_values = module.rounded
    stored_keys, stored_values = of_keys(key), of_values(value)
    for sequence, head, columns, keys, values in module.replaced:
        stored_keys[sequence, head, columns], stored_values[sequence, head, columns] = keys, values
    for states in ((key, value), (stored_keys, stored_values)):
        keys, values = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in states)
        weights = torch.softmax(query @ keys.transpose(2, 3) * options["scaling"] + mask, dim=-1)
        outputs.append((weights @ values).transpose(1, 2))
    exact, stored = outputs
    prompt = module.prompt_columns
    return torch.cat([exact[:, :prompt], stored[:, prompt:]], dim=1), None
