"""Synthetic look-up prompts: the answer stands where the table says it does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from thinkkv.sdk.code_tables import ENTRIES, TABLES, CodeTable, code_tables


@pytest.fixture(scope="module")
def tables(char_tokenizer: Any) -> list[CodeTable]:
    return code_tables(char_tokenizer)


def test_each_table_asks_for_one_of_its_entries(tables: list[CodeTable]) -> None:
    assert len(tables) == TABLES
    for table in tables:
        entries = dict(re.findall(r"^([a-z]{6}): (\d{5})$", table.text.split("\nWhat is")[0], re.MULTILINE))
        asked = re.search(r"What is the code of (\w+)\?\n(\w+): (\d{5})$", table.text)
        assert asked is not None
        assert len(entries) == ENTRIES
        assert asked[1] == asked[2]
        assert entries[asked[1]] == asked[3]


def test_answer_positions_hold_the_answer(tables: list[CodeTable], char_tokenizer: Any) -> None:
    for table in tables:
        found = char_tokenizer.decode([table.ids[position] for position in table.answer_positions])
        assert found == table.text[-len(found) :]
        assert len(found) == table.answer_queries == len(" 12345")
        assert list(table.answer_positions) == sorted(set(table.answer_positions))


def test_last_queries_emit_the_answer(tables: list[CodeTable], char_tokenizer: Any) -> None:
    for table in tables:
        emitting = table.ids[-table.answer_queries :]
        answer = table.text[-table.answer_queries :]
        # Each query emits the token after its own: the colon the first, the last digit but one the last.
        assert char_tokenizer.decode(emitting) == ":" + answer[:-1]


def test_ids_are_the_text_without_its_last_token(tables: list[CodeTable], char_tokenizer: Any) -> None:
    for table in tables:
        assert char_tokenizer.decode(table.ids) == table.text[:-1]


def test_the_entry_asked_for_moves_through_the_table(tables: list[CodeTable]) -> None:
    where = [table.answer_positions[0] / len(table.ids) for table in tables]
    assert where == sorted(where)
    assert where[0] < 0.15
    assert where[-1] > 0.8


def test_tables_are_reproducible_and_differ_by_seed(char_tokenizer: Any) -> None:
    first, again, other = (code_tables(char_tokenizer, tables=2, entries=5, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert first[0].text != first[1].text
