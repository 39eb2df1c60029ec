"""The attention that heads pay to an answer: against the stock model's, on tables that hold it where they say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # scripts, no package

from attention_mass import ENTRIES, TABLES, CodeTable, attention_mass, code_tables

from tests.tiny_models import LAYERS, QUERY_HEADS, new_model, stock_attention

KV_HEADS = 4


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


def test_scores_equal_the_stock_models_attention_mass(tables: list[CodeTable], char_tokenizer: Any) -> None:
    model = new_model("llama", KV_HEADS)
    expected = torch.zeros(LAYERS, KV_HEADS, dtype=torch.float64)
    for table in tables:
        for layer, (attention, _) in enumerate(stock_attention(model, list(table.ids))):
            asking = attention[:, -table.answer_queries :][:, :, list(table.answer_positions)]
            mass = asking.sum(dim=2).mean(dim=1)
            expected[layer] += mass.unflatten(0, (KV_HEADS, QUERY_HEADS // KV_HEADS)).amax(dim=1) / len(tables)
    found = torch.tensor(attention_mass(model, char_tokenizer), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_a_window_shorter_than_the_table_hides_the_answer(char_tokenizer: Any) -> None:
    model = new_model("qwen2-mixed", KV_HEADS)
    sliding = [layer == "sliding_attention" for layer in model.config.layer_types]
    assert [max(row) == 0 for row in attention_mass(model, char_tokenizer)] == sliding
