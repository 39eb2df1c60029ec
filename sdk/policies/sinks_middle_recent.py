"""What Task-KV's heads without a full cache keep: attention sinks, their best middle tokens, recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.plan import PromptView, best, pool
from thinkkv.sdk.policies.policy import Policy


@dataclass(frozen=True)
class Split:
    """How a layer's budget falls to its heads.

    Args:
        full: heads that keep everything.
        sinks, middle, recent: tokens of each other head.
    """

    full: int
    sinks: int
    middle: int
    recent: int


@dataclass(frozen=True)
class SinksMiddleRecent(Policy):
    """A policy with some full heads, whose others keep both ends of the prompt and the best of what lies between.

    Args:
        sinks, recent: tokens of every other head; Task-KV's s1 and s2.
        observation_window: last queries whose attention scores the middle tokens.
        pooling: width of the average over neighbouring scores before the middle tokens are chosen.
    """

    sinks: int = 16
    recent: int = 256
    observation_window: int = 32
    pooling: int = 7

    @property
    def smallest(self) -> int:
        """The sinks and the observation window itself: the question must survive."""
        return self.sinks + self.observation_window

    @property
    def always_kept(self) -> int:
        """Sinks and recent tokens: a shorter prompt has no middle."""
        return self.sinks + self.recent

    @property
    def kept_ends(self) -> tuple[int, int]:
        """Sinks and recent tokens."""
        return self.sinks, self.recent

    @property
    def pooling_width(self) -> int:
        """As for the prompt's middle tokens."""
        return self.pooling

    def split_of(self, full: int, each: int) -> Split:
        """``each`` tokens per other head: sinks, then recent tokens, and what is left for the middle."""
        recent = min(self.recent, each - self.sinks)
        return Split(full, self.sinks, each - self.sinks - recent, recent)

    def keep(
        self, prompt: PromptView, full: tuple[int, ...], split: Split, scores: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Kept positions per KV head: everything for ``full``, both ends and the best middle for the others.

        Args:
            prompt: the prompt, N tokens.
            full: KV heads that keep everything.
            split: how many tokens of each kind.
            scores: [n, N] window scores per KV head.
        """
        tokens, device = prompt.tokens, prompt.keys.device
        if split.recent < 0 or split.sinks + split.recent > tokens:
            raise BudgetError(f"{split.sinks} sinks and {split.recent} recent tokens do not fit {tokens} - keep fewer")
        whole = torch.arange(tokens, device=device)
        ends = torch.cat([whole[: split.sinks], whole[tokens - split.recent :]])
        between = pool(scores[:, split.sinks : tokens - split.recent], self.pooling)
        middle = best(between, split.middle, offset=split.sinks)
        return tuple(
            whole if head in full else torch.cat([ends, middle[head]]).sort().values for head in range(prompt.kv_heads)
        )
