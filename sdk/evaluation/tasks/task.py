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

    def text_of(self, index: int) -> int:
        """Number of the text that sample number ``index`` asks about; what is asked later shares its compression."""
        return index

    def score(self, sample: Sample, said: str) -> float:
        """How right an answer is, 0 to 1."""
        return share_found(sample.answers, said)


@dataclass(frozen=True)
class GeneratedTask(Task):
    """A task that a function makes.

    Args:
        name: as on the command line.
        layout: draws a sample's layout; where a text is asked several questions, for one of them by its number.
        questions: of a text.
    """

    name: str
    layout: Callable[..., Layout]
    questions: int = 1

    def text_of(self, index: int) -> int:
        """One question of a text follows the other."""
        return index // self.questions

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        """A new sample, grown to the size."""
        layouts = [self._layout(seed, self.text_of(index), asked) for asked in range(self.questions)]
        return fit(layouts, tokenizer, size)[index % self.questions]

    def _layout(self, seed: int, text: int, asked: int) -> Layout:
        rng = random.Random(f"{seed}-{self.name}-{text}")
        return self.layout(rng) if self.questions == 1 else self.layout(rng, asked)
