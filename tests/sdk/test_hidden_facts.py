"""Texts with hidden facts: the fact is in the text once, the answer at its end, and the pieces join without loss."""

from __future__ import annotations

from typing import Any

import pytest

from thinkkv.sdk.hidden_facts import HiddenFact, builtin_prompts, hidden_facts


@pytest.fixture(scope="module")
def facts(char_tokenizer: Any) -> list[HiddenFact]:
    return hidden_facts(char_tokenizer)


def answers(facts: list[HiddenFact]) -> list[str]:
    """One token of the tokenizer is one character."""
    return [fact.text[-fact.answer_tokens :].strip() for fact in facts]


def test_every_built_in_prompt_hides_one_sentence(facts: list[HiddenFact]) -> None:
    for fact, answer, plain in zip(facts, answers(facts), builtin_prompts(), strict=True):
        text = fact.text[: len(fact.prompt)]
        hidden = len(text) - len(plain)
        place = next(at for at in range(len(plain) + 1) if text[:at] + text[at + hidden :] == plain)
        assert answer in text[place : place + hidden]
        assert answer not in plain


def test_ids_are_those_of_the_text(facts: list[HiddenFact], char_tokenizer: Any) -> None:
    for fact in facts:
        assert list(fact.prompt + fact.asked) == char_tokenizer(fact.text).input_ids
        assert fact.text[len(fact.prompt) :].startswith("\n\n")


def test_facts_stand_near_the_beginning_and_near_the_end(facts: list[HiddenFact]) -> None:
    where = [fact.text.index(answer) / len(fact.prompt) for fact, answer in zip(facts, answers(facts), strict=True)]
    assert min(where) < 0.15
    assert max(where) > 0.85
