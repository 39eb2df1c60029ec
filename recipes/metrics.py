"""``metrics.jsonl``: one line per logged step, without gaps or duplicates, also after a kill."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from thinkkv.sdk.files import write_whole


class MetricsLog:
    """The metrics of a run.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines; the half line that a kill left is no row."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def append(self, stage: int, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one line and see it on disk before a checkpoint can count on it."""
        row = {"stage": stage, "kind": kind, "step": step, **{key: _plain(value) for key, value in values.items()}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, stage: int, step: int) -> None:
        """Forget what comes after a step of a stage: it will be done, and written, again."""
        kept = [row for row in self.rows() if (row["stage"], row["step"]) <= (stage, step)]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class TokenRate:
    """Tokens a second, from a total that is told now and then.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[float, float] | None = None

    def __call__(self, total: float | None) -> float | None:
        """Rate since the total was told last; None without one before, or where nobody knows it now."""
        if total is None:
            return None
        now, last = self._clock(), self._last
        self._last = now, total
        return (total - last[1]) / max(now - last[0], 1e-9) if last else None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
