"""``curves.png``: what happened over the training steps of all stages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkkv.sdk.files import write_whole

PANELS: Sequence[tuple[str, Sequence[str]]] = (
    ("loss", ("loss",)),
    ("accuracy", ("accuracy",)),
    ("tokens per response", ("completions/mean_length", "mean_tokens")),
    ("share of tokens in critical steps", ("scpo/critical_share",)),
)
"""Title of a panel, and the metrics that may stand in it."""


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]) -> None:
    """Draw the metrics of a run.

    Args:
        path: the picture.
        rows: of ``metrics.jsonl``.
        stages: kind and evaluation of each stage, for the marks at its ends.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    rows = [row for row in rows if row["stage"] < len(stages)]  # not those of a stage that a resumed run is still in
    offsets, ends = _places(rows, len(stages))
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        points = [
            (offsets[row["stage"]] + row["step"], row[name])
            for row in rows
            for name in names
            if isinstance(row.get(name), (int, float))
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1, label="training")
        key = {"accuracy": "accuracy", "tokens per response": "mean_tokens"}.get(title, "critical_share")
        if title != "loss":
            held = [(end, stage[key]["after"]) for end, stage in zip(ends, stages, strict=True)]
            held = [(end, value) for end, value in held if value is not None]
            axes.plot([x for x, _ in held], [y for _, y in held], "o", label="held out")
            axes.legend(fontsize=7)
        for end, stage in zip(ends, stages, strict=True):
            axes.axvline(end, color="0.85", linewidth=1, zorder=0)
            axes.annotate(stage["kind"], (end, 1), xycoords=("data", "axes fraction"), fontsize=6, ha="right", va="top")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step, all stages")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(path, picture.getvalue())


def _places(rows: Sequence[Mapping[str, Any]], stages: int) -> tuple[list[int], list[int]]:
    """Where each stage begins and ends when its steps follow those of the stages before it."""
    offsets, ends, total = [], [], 0
    for index in range(stages):
        offsets.append(total)
        total += max((row["step"] for row in rows if row["stage"] == index), default=0)
        ends.append(total)
    return offsets, ends
