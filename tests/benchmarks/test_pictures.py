"""The pictures of README: their points against hand-computed ones, and that the committed rows have all of them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_points_are_shares_of_bytes_and_means_of_all_needles(tmp_path: Path) -> None:
    def row(task: str, question: str, policy: str, ratio: float, score: float, used: int) -> str:
        cell = {"task": task, "context": 500, "question": question, "sample": 0}
        return json.dumps(cell | {"policy": policy, "ratio": ratio, "score": score, "used_bytes": used})

    files = []
    for question in ("in-window", "after"):
        rows = [
            row(task, question, *setting)
            for task, best in (("niah-single", 1.0), ("passkey", 0.5), ("word-count", 0.9))
            for setting in (
                ("full", 1.0, best, 1000),
                ("snapkv", 0.25, best if question == "after" else 0.0, 250),
                ("snapkv", 0.1, 0.0, 100),
            )
        ]
        files.append(tmp_path / f"{question}.jsonl")
        files[-1].write_text("\n".join(["{}", *rows]) + "\n", encoding="utf-8")
    lines = runpy.run_path(str(BENCHMARKS / "pictures.py"))["lines"]
    # Scores differ from the full cache's by 1 and .5: their standard error is .25.
    assert lines(files, "after") == {
        "full": [(100, 0.75, 0)],
        "snapkv": [(10, 0, pytest.approx(1.96 * 0.25)), (25, 0.75, 0)],
    }
    assert [point[:2] for point in lines(files, "in-window")["snapkv"]] == [(10, 0), (25, 0)]


def test_committed_rows_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path / "drawn")])
    runpy.run_path(str(BENCHMARKS / "pictures.py"), run_name="__main__")
    for name in ("quality.png", "speed.png"):
        drawn, shown = imread(tmp_path / "drawn" / name), imread(BENCHMARKS.parent / "docs" / "pictures" / name)
        assert drawn.shape == shown.shape
        assert drawn.std() > 0.1
