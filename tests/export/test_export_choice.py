"""What ``thinkkv export`` exports: the newest output, an adapter, a policy that shares a profile; or nothing at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.baking import adapter_of, call, dense_logits, profile_of
from tests.tiny_models import prompts
from thinkkv.export.newest import newest_choice
from thinkkv.sdk import models
from thinkkv.sdk.outputs import finish


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def leave(command: str, **result: Any) -> None:
    """A finished output of a command."""
    folder = Path(f"thinkkv-out/{command}-tiny")
    folder.mkdir(parents=True)
    finish(folder, result)


@pytest.fixture
def adapter(checkpoint: Path, work: Path) -> tuple[Path, torch.Tensor]:
    """An adapter of the checkpoint, and the logits that the two should have."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return work / "adapter", adapter_of(model, work / "adapter", base=str(checkpoint))


def merged_logits(folder: Path) -> torch.Tensor:
    """Of an exported checkpoint, in stock transformers."""
    return dense_logits(AutoModelForCausalLM.from_pretrained(folder), prompts((63,)).ids)


def test_a_training_run_brings_its_adapter(checkpoint: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    leave("train", model=str(checkpoint), adapter=str(adapter[0]))
    done = json.loads(call("export", "--format", "safetensors", "--policy", "full", "--json").stdout)
    assert (merged_logits(Path(done["folder"])) - adapter[1]).abs().max() < 1e-4


def test_an_adapter_is_named(checkpoint: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    profile = str(checkpoint.parent / "profile")
    options = ["--adapter", str(adapter[0]), "--profile", profile, "--out", "out"]
    call("export", "--model", str(checkpoint), "--format", "safetensors", *options)
    assert (merged_logits(Path("out")) - adapter[1]).abs().max() < 1e-4


def test_a_training_run_takes_the_profile_of_a_patch_of_its_model(work: Path) -> None:
    patched = {"policy": "task-kv", "ratio": 0.3, "budget": None, "profile": "somewhere"}
    leave("patch", model="base", **patched)
    leave("train", model="base", adapter="adapter")
    found = newest_choice()
    assert (found.model, found.adapter, found.profile) == ("base", Path("adapter"), Path("somewhere"))
    assert (found.policy, found.ratio, found.found_in) == ("task-kv", 0.3, Path("thinkkv-out/train-tiny"))


def test_a_training_run_of_another_model_takes_no_profile(work: Path) -> None:
    leave("patch", model="other", policy="task-kv", ratio=0.3, budget=None, profile="somewhere")
    leave("train", model="base", adapter="adapter")
    found = newest_choice()
    assert (found.model, found.profile, found.policy) == ("base", None, None)


@pytest.mark.parametrize(
    ("policy", "said"),
    [("rehearsed-kv", "--policy retrieval-kv, which takes its profile"), ("snapkv", "--policy full")],
)
def test_a_patch_that_cannot_be_exported_is_refused_before_it_is_loaded(
    checkpoint: Path, work: Path, monkeypatch: pytest.MonkeyPatch, policy: str, said: str
) -> None:
    leave("patch", model=str(checkpoint), policy=policy, ratio=0.4, budget=None, profile=None)
    monkeypatch.setattr(models, "load", None)
    stderr = " ".join(call("export", "--format", "onnx", code=1).stderr.split())
    assert f"is of {policy}, which cannot be exported - name {said}" in stderr


def test_a_policy_that_shares_the_profile_takes_it(checkpoint: Path, work: Path) -> None:
    profile = profile_of(AutoModelForCausalLM.from_pretrained(checkpoint), score="retrieval").save(work / "profile")
    leave("patch", model=str(checkpoint), policy="rehearsed-kv", ratio=0.9, budget=None, profile=str(profile))
    call("export", "--format", "safetensors", "--policy", "retrieval-kv", "--no-verify", "--out", "out")
    calibration = json.loads(Path("out/thinkkv.json").read_text())["calibration"]
    assert calibration == {"prompts": 0, "sha256": "made up"}


def hidden(folder: Path) -> Iterator[Path]:
    """What an unfinished export has written."""
    return folder.glob(".out.*/*")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_terminated_export_leaves_nothing(checkpoint: Path, work: Path, number: signal.Signals) -> None:
    profile = str(checkpoint.parent / "profile")
    arguments = ["export", "--model", str(checkpoint), "--profile", profile, "--format", "onnx", "--out", "out"]
    # What a shell runs in the background ignores SIGINT, and so would the export.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    running = subprocess.Popen([sys.executable, "-c", f"{heed}; from thinkkv.sdk.cli import main; main({arguments})"])
    while not any(hidden(work)):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(number)
    assert running.wait(timeout=60)
    assert list(work.iterdir()) == []
