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


def fit(layout: Layout, tokenizer: Any, size: int) -> Encoded:
    """The longest sample of a layout that has at most ``size`` tokens.

    Args:
        layout: makes samples by their amount of filler.
        tokenizer: counts.
        size: of context and question, tokens.

    Raises:
        ThinkKVError: even without filler it is longer.
    """
    smallest = encode(tokenizer, layout(0))
    if smallest.tokens > size:
        raise ThinkKVError(
            f"a context of {size} tokens is too short: the task alone has {smallest.tokens} - ask for more"
        )
    least, most = 0, 1
    while encode(tokenizer, layout(most)).tokens <= size:
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        if encode(tokenizer, layout(middle)).tokens <= size:
            least = middle
        else:
            most = middle
    return encode(tokenizer, layout(least))


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
