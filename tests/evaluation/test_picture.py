"""The picture of an evaluation: a panel per task, and nothing where none is left."""

from __future__ import annotations

import io

from matplotlib.image import imread

from thinkkv.sdk.evaluation.picture import COLUMNS, draw_scores


def test_places_without_a_task_stay_white() -> None:
    row = {
        "policy": "full",
        "context": 100,
        "question": "after",
        "metric": "accuracy",
        "score": 0.5,
        "ci95": (0.4, 0.6),
    }
    rows = [row | {"task": f"task {number}", "cache_bytes": 2**20} for number in range(COLUMNS + 1)]
    picture = imread(io.BytesIO(draw_scores(rows, "five tasks")))
    height, width = picture.shape[:2]
    right_below = picture[height * 6 // 10 : height * 9 // 10, width // 2 : width * 8 // 10, :3]
    assert (right_below == 1).all()
    assert not (picture[: height // 2, width // 2 : width * 8 // 10, :3] == 1).all()
