"""Results of single samples, written line by line as they come, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.evaluation.setting import profile_key
from thinkkv.sdk.files import write_whole

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
        loss: mean negative log-likelihood of the right answer's tokens in nats; None where the score is a loss, and in
            folders of older releases.
        divergence: of what is predicted in the right answer, or in the text, from what the full cache predicts there:
            mean Kullback-Leibler divergence, nats a token; None in folders of older releases.
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
    loss: float | None = None
    divergence: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from every other outcome of a run."""
        return self.task, self.question, self.context, self.sample, self.policy, self.ratio


class Journal:
    """The outcomes of one run folder.

    Args:
        path: of the file.
        identity: what all outcomes in it have in common: model, dtype, seed.
        calibrations: by ``profile_key``, what the profiles of the policies to come were calibrated on; None without.
        options: of the policies to come, by their names with options; defaults may change from release to release.

    Attributes:
        outcomes: by key.
        profiles: calibrations of all profiles behind the outcomes, those of earlier calls too.
        options: of all policies behind the outcomes, as far as they were noted.

    Raises:
        ThinkKVError: the file holds outcomes of something else, or is damaged.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        calibrations: Mapping[str, Any] = MappingProxyType({}),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._path = path
        self.outcomes: dict[tuple[Any, ...], Outcome] = {}
        self.profiles: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        head = {"schema": SCHEMA, **identity}
        rows = self._read(head) if path.exists() else []
        known = dict(self.profiles), dict(self.options)
        self._take_over(calibrations)
        self._take_over_options(options)
        if not rows or (self.profiles, self.options) != known:
            head |= {"profiles": self.profiles, "options": self.options}
            lines = [json.dumps(row, ensure_ascii=False) for row in [head, *rows[1:]]]
            write_whole(path, "".join(f"{line}\n" for line in lines).encode())

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Append outcomes; they are on the disk when this returns."""
        new = list(outcomes)
        self._write([asdict(outcome) for outcome in new])
        self.outcomes |= {outcome.key: outcome for outcome in new}

    def _take_over(self, calibrations: Mapping[str, Any]) -> None:
        """Add profiles; a policy that has outcomes keeps the one it had, or none."""
        used = {profile_key(outcome.policy) for outcome in self.outcomes.values()}
        for key, calibration in calibrations.items():
            if key in used and self.profiles.get(key) != calibration:
                raise self._of_another_run(f"profile of {key}", self.profiles.get(key), calibration)
        self.profiles |= {key: calibration for key, calibration in calibrations.items() if calibration is not None}

    def _take_over_options(self, options: Mapping[str, Any]) -> None:
        """Add options; a policy that has outcomes keeps those it had, known or not."""
        used = {outcome.policy for outcome in self.outcomes.values()}
        for name, found in options.items():
            if name in used and self.options.get(name, found) != found:
                raise self._of_another_run(f"options of {name}", self.options[name], found)
        self.options |= {name: found for name, found in options.items() if name not in used}

    def _of_another_run(self, what: str, found: Any, now: Any) -> ThinkKVError:
        return ThinkKVError(
            f"{self._path} holds results of another run ({what} {found!r}, now {now!r}) - choose another --out, or "
            "remove it"
        )

    def _read(self, head: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The lines of the file, of which the first says what it holds."""
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
        for name in head if found else ():
            if found[0].get(name) != head[name]:
                raise self._of_another_run(name, found[0].get(name), head[name])
        self.outcomes = {outcome.key: outcome for outcome in outcomes}
        self.profiles = dict(found[0].get("profiles", {})) if found else {}
        self.options = dict(found[0].get("options", {})) if found else {}
        return found

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
