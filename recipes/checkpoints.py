"""Checkpoints of a stage that a kill cannot spoil: only a marked one is resumed from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from thinkkv.recipes.metrics import MetricsLog, TokenRate

MARK = "complete"
"""Empty file that is put into a checkpoint when all of it is on disk."""


STATE = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json")
"""Files of a checkpoint that only training needs."""


class StageCallback(TrainerCallback):
    """Writes metrics and marks checkpoints.

    Args:
        log: where metrics go.
        stage: its index.
        kind: its kind.
        told: called with step, total and values of every log.
    """

    def __init__(self, log: MetricsLog, stage: int, kind: str, told: Any) -> None:
        self.log, self.stage, self.kind, self.told = log, stage, kind, told
        self._rate = TokenRate()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep a step's values; the summary at the end of training is none."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            # TRL's num_tokens: trained on, or sampled with their prompts; not there where an update samples nothing.
            rate = self._rate(logs.get("num_tokens"))
            values = logs if rate is None else {**logs, "tokens_per_second": rate}
            self.log.append(self.stage, self.kind, state.global_step, values)
            self.told(state.global_step, state.max_steps, values)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint that was just written."""
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK).touch()


def newest_complete(folder: Path, *, clean: bool) -> Path | None:
    """The newest marked checkpoint.

    Args:
        folder: of the stage's checkpoints.
        clean: whether to delete the unmarked ones, which a kill left behind.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    marked = [path for path in found if (path / MARK).exists()]
    for path in found if clean else ():
        if path not in marked:
            shutil.rmtree(path)
    return marked[-1] if marked else None


def is_last(checkpoint: Path) -> bool:
    """Whether nothing is left to train after a checkpoint whose weights are whole files."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    whole = any((checkpoint / name).exists() for name in ("adapter_config.json", "config.json"))
    return whole and state["global_step"] >= state["max_steps"]


def copy_weights(checkpoint: Path, target: Path) -> None:
    """Copy what a trainer's final save would have written."""
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(*STATE, MARK))


def drop_checkpoints(stage: Path) -> None:
    """Delete the checkpoints of a finished stage; what a tracker wrote beside them, in ``runs``, stays with the stage.

    Args:
        stage: its folder.
    """
    tracked = stage / "checkpoints" / "runs"
    if tracked.is_dir():
        tracked.rename(stage / "runs")
    shutil.rmtree(stage / "checkpoints", ignore_errors=True)
