r"""Splitting a response into reasoning steps, on token ids.

A step ends behind its delimiter (a blank line by default). Boundaries are found in the text but are always token
boundaries of the sampled ids: nothing is tokenised again, so spans are exact also where a tokenizer merges the
delimiter with its neighbours (``".\n\n"``, ``"\n\nSo"``). Such a token belongs to the step in which it starts.

The paper (arXiv:2507.04348) does not say how it splits; blank lines are common practice (arXiv:2601.03823).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens kept."""

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes half a character to."""


@dataclass(frozen=True)
class StepRules:
    """How a response is split.

    Args:
        delimiter: text that ends a step; repetitions and the whitespace behind them belong to it.
        min_tokens: a shorter step is joined to the next one, the last one to its predecessor.
        max_steps: beyond it, the neighbours that are shortest together are joined until so many are left.
        open_tag: text that opens the reasoning.
        close_tag: text that ends it.
    """

    delimiter: str = "\n\n"
    min_tokens: int = 1
    max_steps: int = 64
    open_tag: str = "<think>"
    close_tag: str = "</think>"

    def __post_init__(self) -> None:
        if not self.delimiter or not self.open_tag or not self.close_tag:
            raise ValueError("delimiter and think tags must not be empty")
        if self.min_tokens < 1 or self.max_steps < 1:
            raise ValueError("min_tokens and max_steps must be at least 1")


@dataclass(frozen=True)
class Steps:
    """A response in parts; all positions are token indices into it, ends exclusive.

    Args:
        spans: the reasoning's steps, gapless and in order; empty where nothing was reasoned.
        answer_start: where the part behind the reasoning starts, its closing tag included.
        length: tokens of the response.
        finished: whether the reasoning was closed, or had no tags at all.
    """

    spans: tuple[tuple[int, int], ...]
    answer_start: int
    length: int
    finished: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each step."""
        return [end - start for start, end in self.spans]


def split_steps(ids: Sequence[int], decode: Decode, rules: StepRules, *, opened: bool) -> Steps:
    """Split one response.

    With tags, the reasoning runs from the opening tag, or from the start if the prompt opened it, to the closing tag;
    without a closing tag it is unfinished and runs to the end. A response without any tag to a prompt without one is
    reasoning up to its last delimiter, and the paragraph behind that is the answer.

    Args:
        ids: the response's tokens, padding removed.
        decode: ids to text.
        rules: how to split.
        opened: whether the prompt, as its template renders it, already ends inside the reasoning.
    """
    pieces = token_texts(ids, decode)
    starts = _offsets(pieces)
    text = "".join(pieces)
    begin, end, finished = _reasoning(text, rules, opened)
    first = 0 if begin == 0 else _token_at(starts, begin)
    # The token that holds the first character of the closing tag starts the answer, whatever else it holds.
    last = _token_holding(starts, end) if end < len(text) else len(ids)
    last = max(first, last)
    cuts = [_token_at(starts, cut) for cut in _cuts(text, begin, end, rules.delimiter)]
    bounds = [first, *sorted({cut for cut in cuts if first < cut < last}), last]
    spans = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    spans = _cap(_join_short(spans, rules.min_tokens), rules.max_steps)
    return Steps(tuple(spans), last, len(ids), finished)


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    """The text that each token adds to those before it; joined, they are the decoded whole.

    Decodes a short moving window, as streamers do, so that the cost is linear. A token that completes no character adds
    nothing; the one that completes it adds all of it.
    """
    pieces: list[str] = []
    window = shown = 0
    known = ""
    for end in range(1, len(ids) + 1):
        text = decode(ids[window:end])
        if text.endswith(INCOMPLETE) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(known) :])
        window, shown = shown, end
        known = decode(ids[window:shown])
    return pieces


def prompt_opens_reasoning(prompt: str, rules: StepRules) -> bool:
    """Whether a rendered prompt ends inside the reasoning: an opening tag with no closing tag behind it."""
    return prompt.rfind(rules.open_tag) > prompt.rfind(rules.close_tag)


def _reasoning(text: str, rules: StepRules, opened: bool) -> tuple[int, int, bool]:
    """Begin and end of the reasoning in characters, and whether it was closed."""
    close = text.find(rules.close_tag)
    found = text.find(rules.open_tag, 0, close if close >= 0 else len(text))
    begin = found + len(rules.open_tag) if found >= 0 else 0
    if close >= 0:
        return begin, close, True
    if opened or found >= 0:
        return begin, len(text), False
    body = text.rstrip()
    last = body.rfind(rules.delimiter)
    return 0, last + len(rules.delimiter) if last >= 0 else 0, True


def _cuts(text: str, begin: int, end: int, delimiter: str) -> list[int]:
    """Characters behind each delimiter and the whitespace that follows it."""
    cuts, position = list[int](), begin
    while (found := text.find(delimiter, position, end)) >= 0:
        position = found + len(delimiter)
        while position < end and text[position] in "\r\n":
            position += 1
        # Delimiters before any text open the first step instead of making an empty one.
        if text[begin:position].strip():
            cuts.append(position)
    return cuts


def _offsets(pieces: Sequence[str]) -> list[int]:
    starts, total = [], 0
    for piece in pieces:
        starts.append(total)
        total += len(piece)
    return starts


def _token_at(starts: Sequence[int], character: int) -> int:
    """The first token that starts at a character or behind it."""
    return next((index for index, start in enumerate(starts) if start >= character), len(starts))


def _token_holding(starts: Sequence[int], character: int) -> int:
    """The last token that starts at a character or before it."""
    behind = next((index for index, start in enumerate(starts) if start > character), len(starts))
    return max(0, behind - 1)


def _join_short(spans: list[tuple[int, int]], shortest: int) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    pending: int | None = None
    for start, end in spans:
        start = start if pending is None else pending
        pending = None
        if end - start < shortest:
            pending = start
        else:
            joined.append((start, end))
    if pending is not None:
        start = joined.pop()[0] if joined else pending
        joined.append((start, spans[-1][1]))
    return joined


def _cap(spans: list[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    spans = list(spans)
    while len(spans) > most:
        at = min(range(len(spans) - 1), key=lambda index: spans[index + 1][1] - spans[index][0])
        spans[at : at + 2] = [(spans[at][0], spans[at + 1][1])]
    return spans
