"""What each setting loses or wins on the same samples: mean difference from one of them, and 1.96 standard errors.

    python benchmarks/paired_differences.py benchmarks/results/eval_several_numbers/samples.jsonl
    python benchmarks/paired_differences.py benchmarks/results/head_choice_per_prompt.jsonl --to farthest:0.5
    python benchmarks/paired_differences.py FOLDER/samples.jsonl --of loss
    python benchmarks/paired_differences.py FOLDER/samples.jsonl --of divergence

Differences of single samples vary less than scores do, so that they show losses which two intervals would hide. The
score of a perplexity is the mean loss in nats: there, and with ``--of loss`` or ``divergence``, more is worse.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Scores = dict[int, float]


def read(path: Path, what: str) -> dict[tuple[Any, ...], dict[tuple[str, float], Scores]]:
    """Scores, or losses, by cell, setting and number of the sample; the first line describes the others."""
    found: dict[tuple[Any, ...], dict[tuple[str, float], Scores]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        row = json.loads(line)
        cell = row["task"], row["context"], row["question"]
        if row.get(what) is not None:
            found[cell][row["policy"], row["ratio"]][row["sample"]] = row[what]
    return found


def difference(base: Scores, other: Scores) -> tuple[float, float]:
    """Mean difference on the samples that both have, and 1.96 standard errors of it."""
    found = [other[number] - base[number] for number in sorted(base.keys() & other.keys())]
    return statistics.mean(found), 1.96 * statistics.stdev(found) / len(found) ** 0.5


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="samples.jsonl of a `thinkkv eval`")
    parser.add_argument("--to", default="full:1", help="what the others are compared with: policy:ratio")
    parser.add_argument("--of", choices=("score", "loss", "divergence"), default="score", help="see docs/eval.md")
    options = parser.parse_args()
    name, _, ratio = options.to.rpartition(":")
    digits = 4 if options.of == "divergence" else 2
    print(f"| task | tokens | question | policy | ratio | samples | {options.of} | difference |\n" + 8 * "|---" + "|")
    for (task, context, question), settings in read(options.samples, options.of).items():
        base = settings[name, float(ratio)]
        for (policy, share), scores in settings.items():
            shown = ""
            if scores is not base:
                mean, error = difference(base, scores)
                shown = f"{mean:+.{digits}f} ± {error:.{digits}f}"
            score = f"{statistics.mean(scores.values()):.{digits}f}"
            print(f"| {task} | {context} | {question} | `{policy}` | {share:g} | {len(scores)} | {score} | {shown} |")


if __name__ == "__main__":
    main()
