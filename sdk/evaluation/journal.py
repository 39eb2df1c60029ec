"""Results of single samples, written line by line as they come, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import ThinkKVError

SCHEMA = 1


@dataclass(frozen=True)
class Outcome:
    """One sample under one setting.

    Args:
        task, question, context: which cell it belongs to.
        sample: its number.
        policy, ratio: the setting.
        tokens: compressed, of this sample.
        score: 0 to 1, or the mean loss in nats.
        said: the answer.
        cache_bytes: allocated right after the compression, this sample's share of its batch.
        used_bytes: of them in use.
    """

    task: str
    question: str
    context: int
    sample: int
    policy: str
    ratio: float
    tokens: int
    score: float
    said: str
    cache_bytes: int
    used_bytes: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from every other outcome of a run."""
        return self.task, self.question, self.context, self.sample, self.policy, self.ratio


class Journal:
    """The outcomes of one run folder.

    Args:
        path: of the file.
        identity: what all outcomes in it have in common: model, dtype, seed.

    Attributes:
        outcomes: by key.

    Raises:
        ThinkKVError: the file holds outcomes of something else, or is damaged.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self.outcomes: dict[tuple[Any, ...], Outcome] = {}
        head = {"schema": SCHEMA, **identity}
        if path.exists():
            self._read(head)
        if not path.exists() or path.stat().st_size == 0:
            self._write([head])

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Append outcomes; they are on the disk when this returns."""
        new = list(outcomes)
        self._write([asdict(outcome) for outcome in new])
        self.outcomes |= {outcome.key: outcome for outcome in new}

    def _read(self, head: Mapping[str, Any]) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # killed in the middle of a line
            os.truncate(self._path, len(whole))
        lines = whole.decode().splitlines()
        try:
            found = [json.loads(line) for line in lines]
            outcomes = [Outcome(**row) for row in found[1:]]
        except (ValueError, TypeError) as error:
            raise ThinkKVError(f"{self._path} is damaged ({error}) - remove it, or choose another --out") from None
        if found and found[0] != head:
            differing = next(key for key in head if found[0].get(key) != head[key])
            raise ThinkKVError(
                f"{self._path} holds results of another run ({differing} {found[0].get(differing)!r}, now "
                f"{head[differing]!r}) - choose another --out, or remove it"
            )
        self.outcomes = {outcome.key: outcome for outcome in outcomes}

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
