"""The tiny recipe cut down to seconds, and a process that runs it and can be killed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

SHORT = (
    "model.scratch.hidden_size=32",
    "model.scratch.intermediate_size=48",
    "data.rows=40",
    "data.eval_rows=4",
    "reward=tests.recipes.lenient_reward.some_right",
    "rollout.max_new_tokens=24",
    "rollout.batch_size=8",
    "stages.0.args.max_steps=10",
    "stages.0.args.per_device_train_batch_size=4",
    "stages.0.args.logging_steps=1",
    "stages.0.args.save_steps=2",
    "stages.1.prompts=16",
    "stages.1.samples=4",
    "stages.2.args.max_steps=6",
    "stages.2.args.per_device_train_batch_size=4",
    "stages.2.args.save_steps=2",
    "stages.3.args.max_steps=8",
    "stages.3.args.per_device_train_batch_size=8",
    "stages.3.args.num_generations=4",
    "stages.3.args.save_steps=2",
)
STEPS = (10, 8, 6, 8)
"""Logged steps of each stage."""


class Quiet:
    """A reporter that nobody listens to."""

    def stage(self, *_: Any) -> None: ...

    def step(self, *_: Any) -> None: ...

    def evaluated(self, *_: Any) -> None: ...

    def note(self, *_: Any) -> None: ...


def run_short(folder: Path, *overrides: str) -> None:
    """Run the short recipe in this process and leave its result in a file."""
    import torch

    torch.set_num_threads(1)
    from thinkkv.recipes.config import find, load
    from thinkkv.recipes.runner import run

    folder.mkdir(parents=True, exist_ok=True)
    result = run(load(find("tiny.yaml"), (*SHORT, *overrides)), folder, Quiet())
    (folder / "result.json").write_text(json.dumps(result))


def start(folder: Path, *overrides: str) -> Any:
    """Run it in a process of its own, forked from one that has imported the libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.recipes.short_run", "thinkkv.recipes.runner", "trl", "peft", "datasets"])
    process = context.Process(target=run_short, args=(folder, *overrides))
    process.start()
    return process
