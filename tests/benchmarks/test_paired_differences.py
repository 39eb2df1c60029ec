"""Differences on the same samples, against hand-computed ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paired_differences.py"


def samples(path: Path, task: str, scores: dict[str, list[float]], *, loss: float | None = 0.5) -> Path:
    rows = [
        {"task": task, "context": 500, "question": "after", "policy": policy, "sample": number, "score": score}
        | {"ratio": 1.0 if policy == "full" else 0.25, "loss": loss}
        for policy, of_policy in scores.items()
        for number, score in enumerate(of_policy)
    ]
    path.write_text("\n".join(json.dumps(row) for row in [{"schema": 1}, *rows]) + "\n", encoding="utf-8")
    return path


def table(*arguments: str | Path) -> list[list[str]]:
    """Cells of the printed rows, without their headings."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_differences_are_of_samples_that_both_have(tmp_path: Path) -> None:
    # Differences -1, 0, 0, -1: mean -.5, standard deviation .577, so 1.96 * .577 / 2. The fifth sample has no partner.
    path = samples(tmp_path / "one.jsonl", "passkey", {"full": [1, 1, 0, 1], "snapkv": [0, 1, 0, 0, 1]})
    assert table(path) == [
        ["passkey", "500", "after", "`full`", "1", "4", "0.75", ""],
        ["passkey", "500", "after", "`snapkv`", "0.25", "5", "0.40", "-0.50 ± 0.57"],
    ]


def test_samples_of_all_tasks_together_but_perplexity(tmp_path: Path) -> None:
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


def test_samples_of_two_runs_of_one_task_are_not_taken_for_the_same(tmp_path: Path) -> None:
    files = [
        samples(tmp_path / name, "passkey", {"full": [1, 1], "snapkv": [score, score]})
        for name, score in (("one.jsonl", 0), ("two.jsonl", 1))
    ]
    assert table(*files)[-1] == ["passkey", "500", "after", "`snapkv`", "0.25", "4", "0.50", "-0.50 ± 0.57"]
