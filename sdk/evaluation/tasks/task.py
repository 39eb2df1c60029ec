"""What every task is: numbered samples of a size, and a score for what a model said."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from thinkkv.sdk.evaluation.sample import Encoded, Layout, Sample, fit
from thinkkv.sdk.evaluation.scoring import share_found

Metric = Literal["accuracy", "perplexity"]


class Task(ABC):
    """Samples by number: the same number, size and seed give the same sample on every machine."""

    name: str
    metric: ClassVar[Metric] = "accuracy"

    @abstractmethod
    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        """Sample number ``index`` with at most ``size`` tokens."""

    def sizes(self, tokenizer: Any, asked: Sequence[int]) -> list[int]:
        """Sizes to evaluate where the user asked for these; data of the user's own has a size already."""
        return list(asked)

    def count(self, asked: int) -> int:
        """How many samples there are where the user asked for so many."""
        return asked

    def score(self, sample: Sample, said: str) -> float:
        """How right an answer is, 0 to 1."""
        return share_found(sample.answers, said)


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task that a function makes.

    Args:
        name: as on the command line.
        layout: draws a sample's layout.
    """

    name: str
    layout: Callable[[random.Random], Layout]

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        """A new sample, grown to the size."""
        return fit(self.layout(random.Random(f"{seed}-{self.name}-{index}")), tokenizer, size)
