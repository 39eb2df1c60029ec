"""A whole run: what it leaves behind, and that a kill at any point costs nothing."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.recipes.short_run import STEPS, start
from thinkkv.recipes.checkpoints import MARK
from thinkkv.recipes.metrics import MetricsLog

pytestmark = pytest.mark.slow
KINDS = ["sft", "rejection_sampling", "sft", "scpo"]


def finish(process: Any) -> None:
    process.join(120)
    assert process.exitcode == 0


def seen(folder: Path) -> list[tuple[int, int]]:
    return [(row["stage"], row["step"]) for row in MetricsLog(folder / "metrics.jsonl").rows()]


EVERY_STEP = [(stage, step) for stage, steps in enumerate(STEPS) for step in range(1, steps + 1)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(folder, "output.merge=true"))
    return folder


def test_a_run_leaves_what_the_contract_names(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert [stage["kind"] for stage in result["stages"]] == KINDS
    assert [stage["steps"] for stage in result["stages"]] == list(STEPS)
    for stage in result["stages"]:
        for key in ("accuracy", "mean_tokens", "critical_share"):
            assert set(stage[key]) == {"before", "after"}
    for earlier, later in zip(result["stages"], result["stages"][1:], strict=False):
        assert earlier["accuracy"]["after"] == later["accuracy"]["before"]
    for name in ("resolved.yaml", "metrics.jsonl", "eval.json", "curves.png", "README.md", "completions.jsonl"):
        assert (finished / name).stat().st_size
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "eval.json").read_text())["stages"] == result["stages"]
    assert seen(finished) == EVERY_STEP


def test_the_adapter_is_stock_peft_and_equals_the_merged_checkpoint(finished: Path) -> None:
    import torch

    result = json.loads((finished / "result.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(result["model"])
    adapted = PeftModel.from_pretrained(base, result["adapter"]).eval()
    merged = AutoModelForCausalLM.from_pretrained(result["merged"]).eval()
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(result["model"]).eval()
    assert (plain(ids).logits - merged(ids).logits).abs().max() > 1e-4


def test_every_stage_says_how_fast_it_is(finished: Path) -> None:
    rows = MetricsLog(finished / "metrics.jsonl").rows()
    rates = {row["kind"]: row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    assert set(rates) == set(KINDS)
    assert min(rates.values()) > 0


def kill(process: Any, when: Callable[[], bool], pause: float = 0.0) -> None:
    """SIGKILL a run as soon as something holds, which must be before it ends."""
    deadline = time.monotonic() + 120
    while not when():
        assert process.is_alive(), "it was over before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def reached(folder: Path, point: tuple[int, int]) -> bool:
    return max(seen(folder), default=(-1, 0)) >= point


def test_kills_lose_nothing(tmp_path: Path, seed: int, finished: Path) -> None:
    draw, folder = random.Random(seed), tmp_path / "killed"
    for stage, steps in enumerate(STEPS):
        point = (stage, draw.randint(1, steps - 1))
        kill(start(folder), lambda point=point: reached(folder, point), pause=draw.random() * 0.05)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("stages/*/done.json")}
    finish(start(folder))
    assert seen(folder) == EVERY_STEP
    assert stages_of(folder) == stages_of(finished)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())  # finished stages were skipped
    assert before


def test_a_kill_right_after_the_last_checkpoint_adds_no_step(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "killed"
    last = folder / "stages" / "0-sft" / "checkpoints" / f"checkpoint-{STEPS[0]}" / MARK
    kill(start(folder), last.exists)
    (folder / "stages" / "0-sft" / "trained.json").unlink(missing_ok=True)
    finish(start(folder))
    assert seen(folder) == EVERY_STEP
    assert stages_of(folder) == stages_of(finished)


def stages_of(folder: Path) -> list[tuple[str, int]]:
    stages = json.loads((folder / "result.json").read_text())["stages"]
    return [(stage["kind"], stage["steps"]) for stage in stages]


def test_a_changed_stage_is_done_again_and_those_before_it_are_not(finished: Path) -> None:
    times = {path.parent.name: path.stat().st_mtime_ns for path in finished.glob("stages/*/done.json")}
    finish(start(finished, "output.merge=true", "stages.3.strength=0.1"))
    again = {path.parent.name: path.stat().st_mtime_ns for path in finished.glob("stages/*/done.json")}
    assert [name for name in sorted(times) if times[name] != again[name]] == ["3-scpo"]
    assert seen(finished) == EVERY_STEP
