"""A transformers cache whose KV heads keep different tokens; all state of a generation is in it, none on the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from transformers.cache_utils import Cache

from thinkkv.patches.errors import UnsupportedGenerationError
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.holding import ComparedLayer
from thinkkv.sdk.layer import HeterogeneousLayer, bookkeeping
from thinkkv.sdk.plan import Entries, KeepPlan
from thinkkv.sdk.whole_prompt import WholePrompt


class HeterogeneousCache(Cache):
    """The cache of one generation on a patched model."""

    layers: list[HeterogeneousLayer]  # type: ignore[assignment]

    def __init__(self, compression: Compression) -> None:
        self.compression = compression
        kind = ComparedLayer if compression.policy.compares_layers else HeterogeneousLayer
        super().__init__(layers=[kind(i, compression) for i in range(len(compression.shapes))])

    @property
    def held(self) -> list[WholePrompt]:
        """Prompts that are to be compressed when all layers have read them, per layer; empty where there are none."""
        held = [layer.held for layer in self.layers if isinstance(layer, ComparedLayer)]
        return [prompt for prompt in held if prompt is not None]

    def compress(self, prompts: list[WholePrompt]) -> None:
        """Fill all layers with what the policy keeps of their prompts, decided for all layers at once.

        Args:
            prompts: per layer; the list is emptied on the way, so that each can be freed as its layer is filled.
        """
        with bookkeeping():
            for layer, plans in zip(self.layers, self._plans(prompts), strict=True):
                layer.fill(prompts.pop(0), plans)

    def _plans(self, prompts: Sequence[WholePrompt]) -> list[tuple[KeepPlan, ...]]:
        """Per layer the plan of each sequence."""
        by_sequence = []
        for sequence, tokens in enumerate(prompts[0].lengths):
            views = [layer.view(prompt, sequence) for layer, prompt in zip(self.layers, prompts, strict=True)]
            if tokens == 0:
                by_sequence.append([KeepPlan.nothing(view) for view in views])
            else:
                budgets = self.compression.allocate(tokens)
                by_sequence.append(self.compression.policy.plan_model(views, budgets))
        return list(zip(*by_sequence, strict=True))

    def kept_positions(self) -> list[list[list[list[int]]]]:
        """Token positions in store: ``[layer][sequence][KV head]``, each ascending; positions skip padding."""
        return [layer.kept_positions() for layer in self.layers]

    def kept_entries(self) -> list[list[list[Entries]]]:
        """What is stored as their keys and values, [kept, D] each, in the same order."""
        return [layer.kept_entries() for layer in self.layers]

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens, as long as they were appended after the prompt.

        Args:
            tokens: negative: how many to forget; positive: how many to have left (transformers before 5.14).

        Raises:
            UnsupportedGenerationError: the crop reaches into the prompt, of which tokens were evicted.
        """
        forget = -tokens if tokens < 0 else max(0, self.get_seq_length() - tokens)
        croppable = min(layer.croppable for layer in self.layers)
        if forget > croppable:
            raise UnsupportedGenerationError(
                f"cropping {forget} tokens reaches into the compressed prompt, "
                f"only the last {croppable} can be forgotten - start a new cache instead"
            )
        for layer in self.layers:
            layer.crop(forget)

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """Refused: beams would need copies of rows of different length."""
        _refuse("beam search", "use greedy search or sampling")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused."""
        _refuse("repeating a filled cache", "repeat the prompt instead (num_return_sequences does)")

    def batch_select_indices(self, indices: torch.Tensor) -> NoReturn:
        """Refused."""
        _refuse("selecting sequences of a filled cache", "start a new cache with those prompts")


def _refuse(what: str, instead: str) -> NoReturn:
    raise UnsupportedGenerationError(f"a thinkkv cache does not support {what} - {instead}")
