"""Step spans are exact on token ids, for any tokenizer and any way a response can begin and end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from thinkkv.recipes.smartthinker.steps import StepRules, prompt_opens_reasoning, split_steps, token_texts

RULES = StepRules()


class Pieces:
    """A tokenizer whose tokens are the given pieces of text."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.ids = list(range(len(pieces)))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[index] for index in ids)

    def split(self, rules: StepRules = RULES, *, opened: bool = False):
        return split_steps(self.ids, self.decode, rules, opened=opened)


def test_tags_by_the_model() -> None:
    steps = Pieces("<think>", "one", "\n\n", "two", "\n\n", "</think>", "7").split()
    assert steps.spans == ((1, 3), (3, 5))
    assert (steps.answer_start, steps.length, steps.finished) == (5, 7, True)
    assert steps.lengths == [2, 2]


def test_tag_opened_by_the_template() -> None:
    steps = Pieces("one", "\n\n", "two", "</think>", "7").split(opened=True)
    assert (steps.spans, steps.answer_start, steps.finished) == (((0, 2), (2, 3)), 3, True)


def test_a_delimiter_merged_with_its_neighbours_belongs_to_the_token_that_starts_in_the_step() -> None:
    steps = Pieces("<think>one", ".\n\n", "two", ".\n\nSo", " three", "\n\n</", "think", ">7").split()
    assert steps.spans == ((1, 2), (2, 4), (4, 5))
    assert steps.answer_start == 5


def test_unfinished_reasoning_has_no_answer() -> None:
    steps = Pieces("<think>", "one", "\n\n", "two").split()
    assert (steps.spans, steps.answer_start, steps.finished) == (((1, 3), (3, 4)), 4, False)
    assert not Pieces("one").split(opened=True).finished


def test_without_any_tag_the_last_paragraph_is_the_answer() -> None:
    steps = Pieces("one", "\n\n", "two", "\n\n", "The answer is 7", "\n").split()
    assert (steps.spans, steps.answer_start, steps.finished) == (((0, 2), (2, 4)), 4, True)
    assert Pieces("7").split().spans == ()


def test_empty_reasoning_and_nothing_at_all() -> None:
    assert Pieces("<think>", "</think>", "7").split().spans == ()
    assert Pieces().split().spans == ()
    assert Pieces("</think>", "7").split(opened=True).spans == ()


def test_repeated_delimiters_make_no_empty_steps() -> None:
    steps = Pieces("\n\n", "one", "\n\n", "\n", "\n\n", "two").split(opened=True)
    assert steps.spans == ((0, 5), (5, 6))


def test_short_steps_join_the_next_and_the_last_its_predecessor() -> None:
    pieces = Pieces("wait", "\n\n", "a", "b", "c", "\n\n", "x", "</think>")
    assert pieces.split(StepRules(min_tokens=3), opened=True).spans == ((0, 7),)
    assert pieces.split(StepRules(min_tokens=2), opened=True).spans == ((0, 2), (2, 7))


def test_the_cap_joins_the_shortest_neighbours() -> None:
    pieces = Pieces("a", "b", "c", "\n\n", "d", "\n\n", "e", "\n\n", "f", "g", "h", "\n\n")
    assert pieces.split(StepRules(max_steps=3), opened=True).spans == ((0, 4), (4, 8), (8, 12))


@pytest.mark.parametrize("prompt", ["<think>", "<think>a</think>b<think>\n"])
def test_a_prompt_that_opens_the_reasoning(prompt: str) -> None:
    assert prompt_opens_reasoning(prompt, RULES)
    assert not prompt_opens_reasoning(prompt + "</think>", RULES)
    assert not prompt_opens_reasoning("", RULES)


@given(st.lists(st.sampled_from(["<think>", "</think>", "\n\n", "\n", "a", " b.", ".\n\n", "", "\n\nSo"]), max_size=25))
def test_spans_cover_the_reasoning_without_gaps(pieces: list[str]) -> None:
    for rules in (RULES, StepRules(min_tokens=3, max_steps=2)):
        for opened in (True, False):
            steps = Pieces(*pieces).split(rules, opened=opened)
            edges = [edge for span in steps.spans for edge in span]
            assert edges == sorted(edges)
            assert all(left[1] == right[0] for left, right in zip(steps.spans, steps.spans[1:], strict=False))
            assert all(end > start for start, end in steps.spans)
            assert not steps.spans or steps.spans[-1][1] == steps.answer_start
            assert len(steps.spans) <= rules.max_steps
            assert steps.answer_start <= steps.length


@pytest.fixture(scope="module")
def byte_tokenizer(smollm2) -> PreTrainedTokenizerFast:
    return smollm2[1]


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60))
def test_token_texts_join_to_the_decoded_whole_also_for_split_characters(byte_tokenizer, text: str) -> None:
    ids = byte_tokenizer(text, add_special_tokens=False).input_ids
    decode = lambda part: byte_tokenizer.decode(part, clean_up_tokenization_spaces=False)  # noqa: E731
    assert "".join(token_texts(ids, decode)) == decode(ids)


def test_a_real_tokenizer_merges_and_the_spans_stay_exact(byte_tokenizer) -> None:
    text = "<think>First, é → 3.\n\nSo it is 4.\n\n\nDone</think>4"
    ids = byte_tokenizer(text, add_special_tokens=False).input_ids
    steps = split_steps(ids, byte_tokenizer.decode, RULES, opened=False)
    shown = [byte_tokenizer.decode(ids[start:end]) for start, end in steps.spans]
    assert [part.strip() for part in shown] == ["First, é → 3.", "So it is 4.", "Done"]
    assert byte_tokenizer.decode(ids[steps.answer_start :]) == "</think>4"
