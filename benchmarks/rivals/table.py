"""Rivals' rows and ours on the same samples, side by side: score, bytes that the ratio promises, bytes really held.

    python benchmarks/rivals/table.py benchmarks/results/rivals_kvpress.jsonl \
        benchmarks/results/eval_2000/samples.jsonl benchmarks/results/eval_rehearsed/samples.jsonl \
        --out benchmarks/results/rivals.md

Ours are taken only where the rival has the same sample; what two files have is taken from the first.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

Row = Mapping[str, Any]
MIB = 2**20


def read(path: Path) -> list[Row]:
    """Rows of JSON lines; a first line that describes the others is left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "score" in row]


def cells(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by task, way of asking, policy and ratio."""
    found = defaultdict(list)
    for row in rows:
        found[row["task"], row["question"], row["policy"], row["ratio"]].append(row)
    return dict(found)


def line(key: tuple[Any, ...], rows: Sequence[Row]) -> str:
    """One row of the table."""
    task, question, policy, ratio = key
    # Ours say what the kept tokens take; a rival's tensors hold what they hold, its ratio promises less where it masks.
    held = mean(row.get("used_bytes", row["cache_bytes"]) for row in rows) / MIB
    nominal = mean(row.get("nominal_bytes", row.get("used_bytes", 0)) for row in rows) / MIB
    score = mean(row["score"] for row in rows)
    return f"| {task} | {question} | `{policy}` | {ratio:g} | {score:.2f} | {len(rows)} | {nominal:.1f} | {held:.1f} |"


def main() -> None:
    """Write the table of all cells that a rival has rows for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rivals", type=Path)
    parser.add_argument("ours", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rivals = read(arguments.rivals)
    asked = {(row["task"], row["question"], row["sample"]) for row in rivals}
    ratios = {row["ratio"] for row in rivals} | {1.0}
    ours: dict[tuple[Any, ...], Row] = {}
    for row in (row for path in arguments.ours for row in read(path)):
        sample = (row["task"], row["question"], row["sample"])
        if sample in asked and row["ratio"] in ratios:
            ours.setdefault((*sample, row["policy"], row["ratio"]), row)
    text = "| task | question | policy | ratio | score | samples | nominal MiB | held MiB |\n" + 8 * "|---" + "|\n"
    both = sorted(cells([*rivals, *ours.values()]).items(), key=lambda cell: (cell[0][0], cell[0][1], cell[0][2]))
    text += "".join(line(key, rows) + "\n" for key, rows in both)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
