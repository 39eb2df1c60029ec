"""What each setting loses or wins on the same samples: mean difference from one of them, and 1.96 standard errors.

    python benchmarks/paired_differences.py benchmarks/results/eval_several_numbers/samples.jsonl
    python benchmarks/paired_differences.py benchmarks/results/head_choice_per_prompt.jsonl --to farthest:0.5
    python benchmarks/paired_differences.py FOLDER/samples.jsonl OTHER/samples.jsonl --of loss
    python benchmarks/paired_differences.py FOLDER/samples.jsonl --of divergence

Differences of single samples vary less than scores do, so that they show losses which two intervals would hide. The
score of a perplexity is the mean loss in nats: there, and with ``--of loss`` or ``divergence``, more is worse. Where
there are several tasks or ways to ask, the last rows are all their samples together, perplexity aside. The questions of
one text of ``niah-every-key`` are not taken as independent; those of one context of own data are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkkv.sdk.evaluation.scoring import standard_error
from thinkkv.sdk.evaluation.tasks import GENERATED

Sample = tuple[Any, ...]
"""Where a sample was read, its task, tokens and question, and its number."""
Settings = dict[tuple[str, float], dict[Sample, float]]
"""Scores of samples, by policy and ratio."""


def read(paths: Sequence[Path], what: str) -> dict[tuple[Any, ...], Settings]:
    """Scores, losses or divergences by task, tokens and question; the first line of a file describes the others."""
    found: dict[tuple[Any, ...], Settings] = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            row = json.loads(line)
            cell = row["task"], row["context"], row["question"]
            if row.get(what) is not None:
                found[cell][row["policy"], row["ratio"]][(path, *cell, row["sample"])] = row[what]
    return found


def together(cells: Mapping[tuple[Any, ...], Settings]) -> Settings:
    """All samples of all cells but perplexity, whose score is none."""
    found: Settings = defaultdict(dict)
    for (task, *_), settings in cells.items():
        for setting, scores in settings.items() if task != "perplexity" else ():
            found[setting] |= scores
    return found


def difference(base: Mapping[Sample, float], other: Mapping[Sample, float]) -> tuple[float, float]:
    """Mean difference on the samples that both have, and 1.96 standard errors of it."""
    found = {sample: score - base[sample] for sample, score in other.items() if sample in base}
    values = list(found.values())
    return statistics.mean(values), 1.96 * standard_error(values, [text_of(sample) for sample in found])


def text_of(sample: Sample) -> Sample:
    """What it is about, at one place."""
    path, task, context, question, number = sample
    return path, task, context, question, GENERATED[task].text_of(number) if task in GENERATED else number


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, nargs="+", help="samples.jsonl of a `thinkkv eval`")
    parser.add_argument("--to", default="full:1", help="what the others are compared with: policy:ratio")
    parser.add_argument("--of", choices=("score", "loss", "divergence"), default="score", help="see docs/eval.md")
    options = parser.parse_args()
    name, _, ratio = options.to.rpartition(":")
    digits = 4 if options.of == "divergence" else 2
    print(f"| task | tokens | question | policy | ratio | samples | {options.of} | difference |\n" + 8 * "|---" + "|")
    cells = read(options.samples, options.of)
    if len(cells) > 1:
        cells["all", "", ""] = together(cells)
    for (task, context, question), settings in cells.items():
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
