"""A ranking of heads to compare with: the attention that they pay to an answer's tokens while it is emitted.

The idea of RazorAttention, HeadKV and others, on synthetic tables of random codes, one of which is asked for. The
answer is appended (teacher-forced), so that the queries which emit it stand at the end of the prompt; the tokens to
find are its first occurrence, in the table.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from thinkkv.sdk.calibration import HeadScorer, head_scores
from thinkkv.sdk.plan import PromptView

TABLES = 6
ENTRIES = 90


@dataclass(frozen=True)
class CodeTable:
    """One tokenised look-up.

    Args:
        text: the prompt with its answer.
        ids: token ids, without the answer's last token, whose query emits nothing of the answer.
        answer_queries: how many of the last queries emit the answer.
        answer_positions: positions of the answer's tokens in the table.
    """

    text: str
    ids: tuple[int, ...]
    answer_queries: int
    answer_positions: tuple[int, ...]


@dataclass(frozen=True)
class MassScorer(HeadScorer):
    """The mass that a KV head's queries put on the answer's tokens; the largest of its query group.

    Args:
        tokens: of the prompt.
        answer_queries: how many of the last queries emit the answer.
        answer_positions: what they should look at.
    """

    name: ClassVar[str] = "attention-mass"

    tokens: int = 0
    answer_queries: int = 1
    answer_positions: tuple[int, ...] = ()

    def score(self, prompt: PromptView) -> torch.Tensor:
        first = self.tokens - prompt.tokens  # a sliding window hides what stands before
        seen = [position - first for position in self.answer_positions if position >= first]
        mass = prompt.window_scores(self.answer_queries)[:, seen].sum(dim=1)
        return mass.unflatten(0, (prompt.kv_heads, -1)).amax(dim=1)


def attention_mass(model: Any, tokenizer: Any, *, tables: int = TABLES) -> tuple[tuple[float, ...], ...]:
    """[layers][KV heads]: the mean over so many tables."""
    found = [
        head_scores(model, table.ids, MassScorer(len(table.ids), table.answer_queries, table.answer_positions))
        for table in code_tables(tokenizer, tables=tables)
    ]
    return tuple(map(tuple, torch.tensor(found).mean(dim=0).tolist()))


def code_tables(tokenizer: Any, *, tables: int = TABLES, entries: int = ENTRIES, seed: int = 0) -> list[CodeTable]:
    """Make look-up prompts, reproducible by ``seed``; the entry asked for moves through the table."""
    rng = random.Random(seed)
    return [_table(tokenizer, rng, entries, asked=(2 * i + 1) * entries // (2 * tables)) for i in range(tables)]


def _table(tokenizer: Any, rng: random.Random, entries: int, asked: int) -> CodeTable:
    names = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(entries)]
    codes = ["".join(rng.choices(string.digits, k=5)) for _ in range(entries)]
    lines = [f"{name}: {code}\n" for name, code in zip(names, codes, strict=True)]
    before = "".join(lines[:asked]) + f"{names[asked]}:"
    answer = f" {codes[asked]}"
    question = "\n" + "".join(lines[asked + 1 :]) + f"\nWhat is the code of {names[asked]}?\n{names[asked]}:"
    # Tokenised piece by piece: the answer's span is then exact, whatever the tokenizer would merge.
    pieces = [
        _ids(tokenizer, before, special=True),
        *(_ids(tokenizer, piece) for piece in (answer, question, answer)),
    ]
    ids = [token for piece in pieces for token in piece]
    start, length = len(pieces[0]), len(pieces[1])
    return CodeTable(before + answer + question + answer, tuple(ids[:-1]), length, tuple(range(start, start + length)))


def _ids(tokenizer: Any, text: str, *, special: bool = False) -> Sequence[int]:
    return list(tokenizer(text, add_special_tokens=special).input_ids)
