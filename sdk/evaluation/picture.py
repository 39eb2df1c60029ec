"""``scores.png``: score against the bytes really held, a panel per task and way of asking, a line per policy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

MIB = 2**20
COLUMNS = 4


def draw_scores(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw the rows of an evaluation.

    Args:
        rows: as in the JSON result.
        title: of the whole picture.

    Returns:
        A PNG.
    """
    panels = list(dict.fromkeys(_panel(row) for row in rows))
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 3.4 * columns, 1.2 + 2.7 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        for color, policy in enumerate(policies):
            mine = sorted((row for row in rows if _panel(row) == panel and row["policy"] == policy), key=_mebibytes)
            if mine:
                _draw_policy(axes, mine, f"C{color}")
        axes.set_title(panel, fontsize=8)
        axes.set_xlim(left=0)
        axes.tick_params(labelsize=7)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    figure.supxlabel("MiB of cache, allocated", fontsize=9)
    figure.suptitle(title, fontsize=10)
    handles = {
        str(handle.get_label()): handle for axes in figure.axes for handle in axes.get_lines() if _is_policy(handle)
    }
    figure.legend(list(handles.values()), list(handles), fontsize=7, loc="outside right upper")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def _draw_policy(axes: Any, rows: Sequence[Mapping[str, Any]], color: str) -> None:
    """A line with its intervals; the full cache has one point, and a line across."""
    bounds = [row["ci95"] or [row["score"]] * 2 for row in rows]
    scores = [row["score"] for row in rows]
    spread = [
        [max(0, score - low) for score, (low, _) in zip(scores, bounds, strict=True)],
        [max(0, high - score) for score, (_, high) in zip(scores, bounds, strict=True)],
    ]
    sizes = [_mebibytes(row) for row in rows]
    axes.plot(sizes, scores, marker="o", markersize=3, linewidth=1.2, color=color, label=rows[0]["policy"])
    axes.errorbar(sizes, scores, yerr=spread, fmt="none", elinewidth=0.6, alpha=0.5, color=color)
    if rows[0]["policy"] == "full":
        axes.axhline(scores[0], linewidth=0.8, linestyle=":", color=color)


def _panel(row: Mapping[str, Any]) -> str:
    return f"{row['task']}, {row['context']}\n{row['metric']}, question {row['question']}"


def _mebibytes(row: Mapping[str, Any]) -> float:
    return float(row["cache_bytes"] / MIB)


def _is_policy(handle: Any) -> bool:
    return not str(handle.get_label()).startswith("_")
