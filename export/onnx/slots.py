"""The keep rule of a bounded cache of fixed size: sinks, chosen middle tokens, and a ring of recent tokens.

Task-KV appends every new token to every head. A graph's buffers cannot grow, so here every head that is not full has
``capacity`` slots. While everything fits, token p stands in slot p. A prompt that does not fit is compacted as in
Task-KV; from then on a new token takes the slot of the oldest recent one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thinkkv.export.block import Block
from thinkkv.patches.errors import BudgetError

GENAI_SLACK = 16
"""Slots that onnxruntime-genai adds on a CPU to the window that its config names; the fewest a bundle can have."""


@dataclass(frozen=True)
class Slots:
    """What every head that is not full keeps.

    Args:
        sinks: slots 0 to S-1, the first tokens.
        middle: slots S to S+M-1, tokens chosen at the end of a prompt by the attention of its last queries.
        recent: the ring, R slots from S+M on.
        observation_window: queries that choose.
        pooling: odd width of the average over neighbouring scores.
    """

    sinks: int
    middle: int
    recent: int
    observation_window: int
    pooling: int

    @property
    def capacity(self) -> int:
        """C."""
        return self.sinks + self.middle + self.recent

    @property
    def fixed(self) -> int:
        """Slots before the ring."""
        return self.sinks + self.middle

    def slot_of(self, position: int) -> int:
        """Where the token at an absolute position is written."""
        return position if position < self.capacity else self.fixed + (position - self.fixed) % self.recent

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
        recent = min(options["recent"], block.kept - sinks - 1)
        return cls(sinks, block.kept - sinks - recent, recent, window, options["pooling"])
