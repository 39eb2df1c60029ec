"""Texts with a fact hidden in them, and a question for it: what heads are eliminated by (``sdk/elimination.py``).

The texts are the built-in calibration prompts; the facts, of different form, stand at different depths. What a task or
a user asks for is not among them: only the heads carry over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class HiddenFact:
    """One tokenised text and question.

    Args:
        text: the text, the question and the answer.
        prompt: token ids of the text with the fact in it.
        asked: token ids of the question and of the answer.
        answer_tokens: how many of the last are the answer.
    """

    text: str
    prompt: tuple[int, ...]
    asked: tuple[int, ...]
    answer_tokens: int


def builtin_prompts() -> list[str]:
    """The small prompt set that ships with thinkkv: reasoning, look-up, code, story, plan."""
    return [line["prompt"] for line in _lines("calibration.jsonl")]


def hidden_facts(tokenizer: Any) -> list[HiddenFact]:
    """A fact in each of the built-in prompts, the first near its beginning, the last near its end."""
    texts, facts = builtin_prompts(), _lines("facts.jsonl")
    return [
        _hidden(tokenizer, text, fact, depth=(2 * i + 1) / (2 * len(texts)))
        for i, (text, fact) in enumerate(zip(texts, facts, strict=True))
    ]


def _hidden(tokenizer: Any, text: str, fact: dict[str, str], depth: float) -> HiddenFact:
    place = text.find(". ", int(len(text) * depth)) + len(". ")
    pieces = (f"{text[:place]}{fact['fact']} {text[place:]}", f"\n\n{fact['question']}", fact["answer"])
    prompt, question, answer = (_ids(tokenizer, piece, special=i == 0) for i, piece in enumerate(pieces))
    return HiddenFact("".join(pieces), tuple(prompt), (*question, *answer), len(answer))


def _ids(tokenizer: Any, text: str, *, special: bool) -> Sequence[int]:
    return list(tokenizer(text, add_special_tokens=special).input_ids)


def _lines(name: str) -> list[dict[str, str]]:
    text = (files("thinkkv.sdk") / "prompts" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
