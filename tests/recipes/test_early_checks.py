"""What can be known to fail is one clear line before any work; neither full disk nor tracker loses anything."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from tests.recipes.short_run import SHORT, Quiet
from thinkkv.patches.errors import RecipeError, ThinkKVError
from thinkkv.recipes import config
from thinkkv.recipes.metrics import MetricsLog
from thinkkv.recipes.problems import Problems
from thinkkv.recipes.runner import FREE_BYTES, run, space_needed
from thinkkv.recipes.trainer_arguments import check_arguments
from thinkkv.recipes.weights import Weights, open_model

PACKAGED = sorted(path.name for path in (Path(config.__file__).parent).glob("*.yaml"))
ONE_STAGE = "stages=[{kind: sft, data: traces, args: {max_steps: 6, per_device_train_batch_size: 2, save_steps: 2}}]"


def short(*overrides: str) -> config.Recipe:
    before = [override for override in SHORT if not override.startswith("stages.")]
    return config.load(config.find("tiny.yaml"), (*before, ONE_STAGE, *overrides))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_suit_trl_and_peft(name: str) -> None:
    check_arguments(config.load(config.find(name)), Problems([{"completion": "a trace"}], []))


@pytest.mark.parametrize("name", PACKAGED)
def test_a_wrong_key_of_any_block_is_named_with_its_line(name: str) -> None:
    stages = config.load(config.find(name)).stages
    blocks = ["lora", *(f"stages.{at}.args" for at, stage in enumerate(stages) if hasattr(stage, "args"))]
    for block in blocks:
        wrong = config.load(config.find(name), (f"{block}.qqqq=1",))
        with pytest.raises(RecipeError, match=rf"--set {block}.qqqq=1: unknown key {block}.qqqq - "):
            check_arguments(wrong, Problems([{"completion": "a trace"}], []))


def test_a_value_that_trl_refuses_is_named_with_its_line(tmp_path: Path) -> None:
    text = config.find("scpo.yaml").read_text().replace("num_generations: 8", "num_generations: 7")
    (tmp_path / "my.yaml").write_text(text)
    line = text.splitlines().index("  - kind: scpo") + 4
    with pytest.raises(RecipeError, match=rf"my.yaml, line {line}: stages.2.args: .*num_generations"):
        check_arguments(config.load(tmp_path / "my.yaml"), Problems([], []))


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorbord", "tensorbord is not supported, only"), ("wandb", "requires wandb to be installed")],
)
def test_a_tracker_that_is_not_there_is_named_with_its_line(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    recipe = config.load(config.find("sft.yaml"), (f"output.report_to=[{name}]",))
    with pytest.raises(RecipeError, match=rf"output.report_to=.*: output.report_to: .*{said}.* - install {name}"):
        check_arguments(recipe, Problems([], []))


def test_traces_are_asked_for_before_the_model_is_loaded() -> None:
    with pytest.raises(RecipeError, match=r"stages.0 trains on traces and 1 of 2 rows of .* have no completion"):
        check_arguments(short(), Problems([{"completion": "a trace"}, {}], []))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(ThinkKVError, match=r"cannot write to /proc/self .* choose another folder with --out"):
        run(short(), Path("/proc/self"), Quiet())


def test_too_little_space_is_refused_before_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = short()
    needed = space_needed(recipe, open_model(recipe, Weights(), trainable=True))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(ThinkKVError, match=r"GiB free and the run needs about 0\.\d+ - free some space"):
        run(recipe, tmp_path, Quiet())
    assert not (tmp_path / "stages").exists()


def test_the_space_a_run_needs_by_hand() -> None:
    recipe, model = short("output.merge=true"), torch.nn.Linear(10, 100, bias=False)
    assert space_needed(recipe, model) == FREE_BYTES + 4000 * (9 + 1 + 1) + 4000
    model.requires_grad_(False)
    assert space_needed(recipe, model) == FREE_BYTES + 4000


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")],
    ids=["python", "torch"],
)
def test_a_disk_that_fills_is_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def append(*_: Any) -> None:
        if (tmp_path / "stages" / "0-sft" / "checkpoints" / "checkpoint-4").exists():
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
            raise error

    log = MetricsLog.append
    with monkeypatch.context() as full:
        full.setattr(MetricsLog, "append", lambda *values: append() or log(*values))
        with pytest.raises(ThinkKVError, match=r"is full - free some space; the same command goes on"):
            run(short(), tmp_path, Quiet())
    monkeypatch.undo()
    run(short(), tmp_path, Quiet())
    assert [row["step"] for row in MetricsLog(tmp_path / "metrics.jsonl").rows()] == [1, 2, 3, 4, 5, 6]


def test_what_a_tracker_writes_survives_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker(TrainerCallback):
        """Writes where TensorBoard's does."""

        def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
            (Path(args.output_dir) / "runs").mkdir(parents=True)
            (Path(args.output_dir) / "runs" / "events").write_text("loss")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    run(short("output.report_to=[tensorboard]"), tmp_path, Quiet())
    assert (tmp_path / "stages" / "0-sft" / "runs" / "events").read_text() == "loss"
    assert not list(tmp_path.rglob("checkpoint*"))
