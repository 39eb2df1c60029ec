"""What a model says, and what it predicts in a text, from a cache that was compressed before."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any

import torch

from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.evaluation.prefill import left_padded, positions


class Turn:
    """A batch of conversations that goes on: the model, a filled cache, and what the cache has seen."""

    def __init__(self, model: Any, cache: HeterogeneousCache, mask: torch.Tensor) -> None:
        self._model, self._cache, self._mask = model, cache, mask

    def copy(self) -> Turn:
        """The same conversations, to go on in another way."""
        return Turn(self._model, deepcopy(self._cache), self._mask)

    @torch.inference_mode()
    def feed(self, rows: Sequence[Sequence[int]], *, keep: int) -> torch.Tensor:
        """Append tokens to every conversation.

        Args:
            rows: token ids, of different lengths.
            keep: logits of so many of the last tokens are wanted.

        Returns:
            [B, keep, V].
        """
        ids, mask = left_padded(rows, self._mask.device)
        self._mask = torch.cat([self._mask, mask], dim=1)
        out = self._model(
            ids,
            attention_mask=self._mask,
            position_ids=positions(self._mask)[:, -ids.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        logits: torch.Tensor = out.logits
        return logits

    def answer(self, logits: torch.Tensor, new_tokens: int, stop: Collection[int]) -> list[list[int]]:
        """Greedy answers.

        Args:
            logits: [B, V] after what was fed last.
            new_tokens: at most, per answer.
            stop: token ids that end an answer and do not belong to it.
        """
        said: list[list[int]] = [[] for _ in logits]
        ended = [False] * len(said)
        for step in range(new_tokens):
            tokens = logits.argmax(dim=-1).tolist()
            for row, token in enumerate(tokens):
                ended[row] |= token in stop
                if not ended[row]:
                    said[row].append(token)
            if all(ended) or step == new_tokens - 1:
                break
            logits = self.feed([[token] for token in tokens], keep=1)[:, -1]
        return said

    def predictions(self, rows: Sequence[Sequence[int]], logits: torch.Tensor | None) -> list[torch.Tensor]:
        """What is predicted in the place of each token of a text, by the cache and the tokens before it.

        Args:
            rows: token ids, of different lengths of at least 1.
            logits: [B, V] after what was fed last; None: the first token's place is left out.

        Returns:
            [T, V] float32 log-probabilities for each row.
        """
        longest = max(map(len, rows))
        fed = self.feed(rows, keep=longest)
        found = []
        for number, row in enumerate(rows):
            predicted = fed[number, longest - len(row) : -1]
            if logits is not None:
                predicted = torch.cat([logits[number, None], predicted])
            found.append(torch.log_softmax(predicted.float(), dim=-1))
        return found
