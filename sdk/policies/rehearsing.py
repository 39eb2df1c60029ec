"""What policies share that choose tokens by the attention in a second reading of the prompt (``sdk/rehearsal.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from thinkkv.patches.errors import UnsupportedGenerationError
from thinkkv.sdk.plan import PromptView
from thinkkv.sdk.policies.policy import Policy


@dataclass(frozen=True)
class Rehearsing(Policy):
    """A policy whose prompts are read twice; every head keeps both ends of them besides.

    Args:
        sinks, recent: tokens at both ends that every head keeps.
        whole: prompts of up to so many tokens are kept whole, as short ones as with Task-KV: a few bytes are not worth
            a second reading.
    """

    compares_layers: ClassVar[bool] = True
    rehearses: ClassVar[bool] = True

    sinks: int = 16
    recent: int = 32
    whole: int = 272

    @property
    def smallest(self) -> int:
        """Both ends."""
        return self.sinks + self.recent

    @property
    def always_kept(self) -> int:
        """What was asked for, and both ends in any case."""
        return max(self.whole, self.smallest)

    @property
    def kept_ends(self) -> tuple[int, int]:
        """Sinks and recent tokens."""
        return self.sinks, self.recent

    def rehearsed(self, prompt: PromptView) -> torch.Tensor:
        """[n, N] float32: the most attention that each token got in the second reading.

        Raises:
            UnsupportedGenerationError: there was none.
        """
        return self._noted(prompt.rehearsed)

    def rehearsed_sum(self, prompt: PromptView) -> torch.Tensor:
        """[n, N] float32: all attention that each token got in the second reading.

        Raises:
            UnsupportedGenerationError: there was none.
        """
        return self._noted(prompt.rehearsed_sum)

    def reread(self, prompt: PromptView) -> torch.Tensor:
        """[n, R, D]: queries of the second reading.

        Raises:
            UnsupportedGenerationError: there was none.
        """
        return self._noted(prompt.reread)

    def shuffled(self, prompt: PromptView) -> torch.Tensor:
        """[n, R, D]: queries of the prompt's tokens in random order.

        Raises:
            UnsupportedGenerationError: there were none.
        """
        return self._noted(prompt.shuffled)

    def with_ends(self, prompt: PromptView, scores: torch.Tensor) -> torch.Tensor:
        """[n, N] scores that are infinite where a token is kept for certain."""
        scores = scores.clone()
        scores[:, : self.sinks] = scores[:, prompt.tokens - self.recent :] = float("inf")
        return scores

    def _noted(self, scores: torch.Tensor | None) -> torch.Tensor:
        if scores is None:
            raise UnsupportedGenerationError(
                f"{self.name} needs a prompt that was read twice - pass it through the model that sdk.apply patched, "
                "not through its decoder layers"
            )
        return scores
