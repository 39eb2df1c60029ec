"""The keep rule of a bounded cache of fixed size: sinks, chosen middle tokens, and the recent ones.

Task-KV appends every new token to every head. A graph's buffers cannot grow, so here every head that is not full has
``capacity`` slots. While everything fits, token p stands in slot p. A prompt that does not fit is compacted as in
Task-KV. Later tokens are appended, and whenever the slots are full the ``stride`` oldest recent tokens go at once and
the others move up: so nearly every step of decoding is what it would be with a full cache, and nothing but a length
tells it apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.block import Block

GENAI_SLACK = 16
"""Slots that onnxruntime-genai adds on a CPU to the window that its config names; the fewest a bundle can have."""

MOST_BLOCKS = 16
"""Equal parts in which the values of a long full cache are read, if they divide its length."""

LONGEST_STRIDE = 16
"""Moving recent tokens up takes the time of a few steps; once in so many it is not felt."""


@dataclass(frozen=True)
class Slots:
    """What every head that is not full keeps.

    Args:
        sinks: the first tokens, in the first slots.
        middle: tokens chosen at the end of a prompt by the attention of its last queries, in the next slots.
        recent: the last tokens, at least so many.
        observation_window: queries that choose.
        pooling: odd width of the average over neighbouring scores.
        stride: recent tokens that go at once; up to ``stride - 1`` older ones stay meanwhile.
    """

    sinks: int
    middle: int
    recent: int
    observation_window: int
    pooling: int
    stride: int = 1

    @property
    def capacity(self) -> int:
        """C."""
        return self.fixed + self.recent + self.stride - 1

    @property
    def fixed(self) -> int:
        """Slots of sinks and middle tokens."""
        return self.sinks + self.middle

    def in_use(self, seen: int) -> int:
        """Slots that are in use once ``seen`` tokens were read: told from their number alone, a graph has no more."""
        return seen - max(0, seen - self.capacity + self.stride - 1) // self.stride * self.stride

    @classmethod
    def of(cls, block: Block) -> Slots:
        """The slots that a block's budget leaves to the other heads.

        Raises:
            BudgetError: fewer than sinks, a middle token and the observation window.
        """
        options: Mapping[str, Any] = block.options
        sinks, window = options["sinks"], options["observation_window"]
        smallest = max(sinks + window + 1, GENAI_SLACK + 1)
        if block.kept < smallest:
            raise BudgetError(
                f"the budget leaves {block.kept} tokens to a head that is not full, a bundle needs {smallest} - "
                "raise --ratio, --budget or --context"
            )
        stride = 1 + min(LONGEST_STRIDE - 1, (block.kept - sinks) // LONGEST_STRIDE)
        recent = min(options["recent"], block.kept - sinks - stride)
        middle = block.kept - sinks - recent - stride + 1
        return cls(sinks, middle, recent, window, options["pooling"], stride)


def in_blocks(length: int) -> int:
    """Tokens for which to make full caches, so many at least, so that they are read in as many blocks as can be."""
    return -(-length // MOST_BLOCKS) * MOST_BLOCKS
