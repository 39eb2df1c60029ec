"""Differences on the same samples, against hand-computed ones."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paired_differences.py"
Table = Callable[..., list[list[str]]]


def samples(path: Path, task: str, scores: dict[str, list[float]], *, loss: float | None = 0.5) -> Path:
    rows = [
        {"task": task, "context": 500, "question": "after", "policy": policy, "sample": number, "score": score}
        | {"ratio": 1.0 if policy == "full" else 0.25, "loss": loss}
        for policy, of_policy in scores.items()
        for number, score in enumerate(of_policy)
    ]
    path.write_text("\n".join(json.dumps(row) for row in [{"schema": 1}, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Table:
    """Cells of the printed rows, without their headings."""

    def run(*arguments: str | Path) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()[2:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    return run


def test_differences_are_of_samples_that_both_have(tmp_path: Path, table: Table) -> None:
    # Differences -1, 0, 0, -1: mean -.5, standard deviation .577, so 1.96 * .577 / 2. The fifth sample has no partner.
    path = samples(tmp_path / "one.jsonl", "passkey", {"full": [1, 1, 0, 1], "snapkv": [0, 1, 0, 0, 1]})
    assert table(path) == [
        ["passkey", "500", "after", "`full`", "1", "4", "0.75", ""],
        ["passkey", "500", "after", "`snapkv`", "0.25", "5", "0.40", "-0.50 ± 0.57"],
    ]


def test_samples_of_all_tasks_together_but_perplexity(tmp_path: Path, table: Table) -> None:
    files = [
        samples(tmp_path / "one.jsonl", "passkey", {"full": [1, 1], "snapkv": [0, 1]}),
        samples(tmp_path / "two.jsonl", "word-count", {"full": [0, 0], "snapkv": [0, 1]}),
        samples(tmp_path / "three.jsonl", "perplexity", {"full": [3, 3], "snapkv": [4, 4]}, loss=None),
    ]
    # Differences -1, 0, 0, 1.
    *_, full, snapkv = table(*files)
    assert full == ["all", "", "", "`full`", "1", "4", "0.50", ""]
    assert snapkv == ["all", "", "", "`snapkv`", "0.25", "4", "0.50", "+0.00 ± 0.80"]
    assert {row[0] for row in table(*files, "--of", "loss")} == {"passkey", "word-count", "all"}


def test_samples_of_two_runs_of_one_task_are_not_taken_for_the_same(tmp_path: Path, table: Table) -> None:
    files = [
        samples(tmp_path / name, "passkey", {"full": [1, 1], "snapkv": [score, score]})
        for name, score in (("one.jsonl", 0), ("two.jsonl", 1))
    ]
    assert table(*files)[-1] == ["passkey", "500", "after", "`snapkv`", "0.25", "4", "0.50", "-0.50 ± 0.57"]


def test_questions_of_one_text_are_not_taken_as_independent(tmp_path: Path, table: Table) -> None:
    # Two texts with four questions, differences -1 and 0: mean -.5, the texts' sums -2 and 2 around it.
    asked = {"full": [1.0] * 8, "snapkv": [0.0] * 4 + [1.0] * 4}
    *_, alike = table(samples(tmp_path / "one.jsonl", "niah-every-key", asked))
    *_, alone = table(samples(tmp_path / "two.jsonl", "niah-multikey", asked))
    assert alike[-1] == "-0.50 ± 0.98"
    assert alone[-1] == "-0.50 ± 0.37"
