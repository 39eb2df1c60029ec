"""The head map: a picture of layers x KV heads, coloured by calibration score, full-cache heads marked."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from thinkkv.sdk.profile import HeadProfile

_LABELS = {
    "distance": "distance from the layer's semantic center / layer mean",
    "retrieval": "place in the order of elimination (1: the last to go)",
}


def draw_head_map(profile: HeadProfile) -> bytes:
    """Draw a profile.

    Returns:
        A PNG. Distances are divided by their layer's mean, because they grow with depth and heads compete per layer.
    """
    rows = [list(row) for row in profile.scores]
    if profile.score == "distance":
        rows = [[score / max(1e-12, sum(row) / len(row)) for score in row] for row in rows]
    layers, heads = len(rows), len(rows[0])
    figure = Figure(figsize=(2.4 + min(10.0, 0.45 * heads), 1.6 + min(14.0, 0.22 * layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest")
    marked = [(head, layer) for layer, row in enumerate(profile.heterogeneous) for head in row]
    if marked:
        head, layer = zip(*marked, strict=True)
        axes.scatter(head, layer, s=26, facecolors="none", edgecolors="red", linewidths=1.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="KV head", ylabel="layer (0 = bottom)")
    axes.set_title(
        f"{profile.fingerprint['model_type']}: {len(marked)} of {layers * heads} KV heads full (red)",
        fontsize=9,
    )
    figure.colorbar(image, label=_LABELS[profile.score])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
