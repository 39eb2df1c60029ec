"""``speed.png``: decode speed and cache bytes over the context, a line per runtime, policy, ratio and threads."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

PANELS = (
    ("decode tokens/s", lambda row: row["decode_tokens_per_second"]),
    ("seconds to the first token", lambda row: row["prefill_seconds"]),
    ("MiB of cache, allocated", lambda row: row["cache_bytes"] / 2**20),
)


def draw_speed(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw the rows of a benchmark.

    Returns:
        A PNG.
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    labels = list(dict.fromkeys(label(row) for row in rows))
    for axes, (name, value) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for text in labels:
            mine = sorted((row["context"], value(row)) for row in rows if label(row) == text)
            axes.plot(*zip(*mine, strict=True), marker="o", markersize=3, linewidth=1.2, label=text)
        axes.set(xlabel="prompt tokens", title=name)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=6)
    figure.suptitle(title, fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def label(row: Mapping[str, Any]) -> str:
    """Name of a line."""
    ratio = "" if row["ratio"] == 1 else f" {row['ratio']:g}"
    threads = f", {row['threads']} threads" if row["threads"] else ""
    return f"{row['runtime']} {row['policy']}{ratio}{threads}"
