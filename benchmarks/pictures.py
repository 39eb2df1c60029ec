"""The pictures of README and docs/results.md, drawn from committed rows.

    python benchmarks/pictures.py

``quality.png``: mean score of all needles, by the bytes in use; bars are 1.96 standard errors of the mean difference
from the full cache on the same samples. ``speed.png``: decode speed and cache bytes by context.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from paired_differences import difference, read, together

from thinkkv.sdk.files import whole_file

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OVERVIEW = [RESULTS / f"eval_overview_{way}" / "samples.jsonl" for way in ("in_window", "after")]
DECODING = RESULTS / "decode_speed.json"

NEEDLES = ("niah-single", "niah-multikey", "niah-multivalue", "passkey")
WAYS = {"in-window": "question compressed with the text", "after": "question after the compression"}
FULL = "full", 1.0

COLORS = {
    "matched-kv+cache_dtype=k8v5": "tab:red",
    "reread-kv+cache_dtype=k8v5": "tab:orange",
    "retrieval-kv+cache_dtype=k8v5": "gold",
    "retrieval-kv": "khaki",
    "kvzip+cache_dtype=k8v5": "tab:purple",
    "kvzip": "plum",
    "task-kv": "tab:blue",
    "snapkv+cache_dtype=k8v5": "tab:green",
    "snapkv": "yellowgreen",
    "adakv": "tab:brown",
    "pyramidkv": "tab:gray",
}

SETTINGS = {
    "stock": ("stock transformers", "tab:gray"),
    "full-1": ("full, our kernels", "tab:cyan"),
    "task-kv-0.25": ("task-kv, 25 %", "tab:blue"),
    "task-kv-0.25+compiled": ("task-kv, 25 %, compiled", "tab:red"),
}

Point = tuple[float, float, float]
"""Bytes in % of the full cache's, mean score, half width of its bar."""


def lines(samples: Iterable[Path], question: str) -> dict[str, list[Point]]:
    """Of each policy its points by bytes, over all needles that are asked about in this way."""
    scores, sizes = (
        together({cell: found for cell, found in read([*samples], what).items() if _is_shown(cell, question)})
        for what in ("score", "used_bytes")
    )
    whole = statistics.mean(sizes[FULL].values())
    found: dict[str, list[Point]] = {}
    for setting, mine in scores.items():
        share = 100 * statistics.mean(sizes[setting].values()) / whole
        point = share, statistics.mean(mine.values()), difference(scores[FULL], mine)[1]
        found[setting[0]] = sorted([*found.get(setting[0], []), point])
    return found


def draw_quality(samples: Sequence[Path]) -> Figure:
    """A panel for each way to ask, a line per policy."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (question, title) in zip(figure.subplots(1, 2, sharey=True), WAYS.items(), strict=True):
        found = lines(samples, question)
        for policy, color in COLORS.items():
            shares, means, errors = zip(*found[policy], strict=True)
            axes.errorbar(
                shares, means, errors, color=color, label=policy.replace("+cache_dtype=", ", "), marker="o",
                markersize=3, linewidth=1.4, elinewidth=0.5,
            )  # fmt: skip
        axes.axhline(found["full"][0][1], color="black", linewidth=0.8, linestyle=":", label="full cache")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("% of the full cache's bytes")
        axes.set(xlim=(0, None), ylim=(0, None))
    figure.axes[0].set_ylabel("mean score of all needles")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


def draw_speed(rows: Iterable[Mapping[str, Any]]) -> Figure:
    """Bars by context, in bfloat16: tokens per second, and MiB of cache."""
    panels: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "decode tokens/s": lambda row: float(row["decode_tokens_per_second"]),
        "MiB of cache, allocated": lambda row: float(row["cache_bytes"] / 2**20),
    }
    of = {(row["setting"], row["context"]): row for row in rows if row["dtype"] == "bfloat16"}
    contexts = sorted({context for _, context in of})
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for place, (setting, (label, color)) in enumerate(SETTINGS.items()):
            where = [at + 0.2 * (place - 1.5) for at in range(len(contexts))]
            heights = [value(of[setting, context]) for context in contexts]
            axes.bar_label(axes.bar(where, heights, 0.19, color=color, label=label), fmt="%.0f", fontsize=7)
        axes.set_xticks(range(len(contexts)), [f"{context:,} tokens" for context in contexts])
        axes.set_title(title, fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return figure


def _is_shown(cell: tuple[Any, ...], question: str) -> bool:
    task, _, asked = cell
    return task in NEEDLES and asked == question


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    _save(draw_quality(OVERVIEW), out / "quality.png")
    _save(draw_speed(json.loads(DECODING.read_text(encoding="utf-8"))["rows"]), out / "speed.png")


if __name__ == "__main__":
    main()
