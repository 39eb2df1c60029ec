"""One question about one text, and how such a text is grown to a number of tokens."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.evaluation.filler import sentences


@dataclass(frozen=True)
class Sample:
    """What a model is asked.

    Args:
        context: the text.
        question: what follows it: the question and the beginning of the answer.
        answers: what the answer must hold, all of it.
        entry: what a task's own verifier needs.
        worked: the whole answer, where it holds more than ``answers``, or in another order.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    entry: Mapping[str, Any] | None = None
    worked: str = ""

    @property
    def expected(self) -> str:
        """A whole right answer, to know how long one is."""
        return self.worked or ", ".join(self.answers)


Layout = Callable[[int], Sample]
"""A sample with so many pieces of filler; the same for the same number, longer for a larger one."""


@dataclass(frozen=True)
class Encoded:
    """A sample as a tokenizer sees it; the tokens are the same whether or not the cache is compressed in between.

    Args:
        sample: its text.
        context, question: token ids.
    """

    sample: Sample
    context: tuple[int, ...]
    question: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of context and question."""
        return len(self.context) + len(self.question)


def encode(tokenizer: Any, sample: Sample) -> Encoded:
    """Tokenise context and question apart, so that both ways of asking feed the same ids."""
    context = tokenizer(sample.context).input_ids
    question = tokenizer(sample.question, add_special_tokens=False).input_ids
    return Encoded(sample, tuple(context), tuple(question))


def fit(layouts: Sequence[Layout], tokenizer: Any, size: int) -> list[Encoded]:
    """The longest samples of one text, with as much filler each, that have at most ``size`` tokens.

    Args:
        layouts: make samples by their amount of filler, one for each question.
        tokenizer: counts.
        size: of context and question, tokens.

    Raises:
        ThinkKVError: even without filler one is longer.
    """

    def tokens(pieces: int) -> int:
        return max(encode(tokenizer, layout(pieces)).tokens for layout in layouts)

    if (smallest := tokens(0)) > size:
        raise ThinkKVError(f"a context of {size} tokens is too short: the task alone has {smallest} - ask for more")
    least, most = 0, 1
    while tokens(most) <= size:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if tokens(middle) <= size else (least, middle)
    return [encode(tokenizer, layout(least)) for layout in layouts]


def scattered(
    rng: random.Random, facts: Sequence[str], question: str, answers: Sequence[str], *, opening: str, worked: str = ""
) -> Layout:
    """A layout that scatters facts, in their order, over prose.

    Args:
        rng: chooses places and prose.
        facts: sentences.
        question: with the beginning of the answer.
        answers: what the answer must hold.
        opening: first paragraph, which says what the text is.
        worked: the whole answer, where it holds more than ``answers``, or in another order.
    """
    depths = sorted(rng.random() for _ in facts)
    prose = sentences(random.Random(rng.random()))
    drawn: list[str] = []

    def layout(pieces: int) -> Sample:
        drawn.extend(itertools.islice(prose, max(0, pieces - len(drawn))))
        text = drawn[:pieces]
        for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda placed: -placed[0]):
            text.insert(round(depth * pieces), fact)
        return Sample(f"{opening}\n\n{' '.join(text)}", question, tuple(answers), worked=worked)

    return layout
