"""``thinkkv train`` as a user meets it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from tests.recipes.short_run import SHORT, STEPS
from thinkkv.sdk import extras

ROOT = Path(__file__).parents[2]
ARGUMENTS = [part for override in SHORT for part in ("--set", override)]


def test_the_documented_presets_are_trls() -> None:
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\$PRESETS/(\w+\.yaml)", text))
    assert len(names) == 2
    presets = resources.files("trl") / "accelerate_configs"
    assert all((presets / name).is_file() for name in names)


@pytest.mark.slow
def test_a_packaged_recipe_runs_from_anywhere(thinkkv, tmp_path: Path) -> None:
    done = thinkkv("train", "recipes/tiny.yaml", *ARGUMENTS, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert [stage["steps"] for stage in result["stages"]] == list(STEPS)
    assert result["adapter"]
    assert result["merged"] is None
    folder = tmp_path / "thinkkv-out" / "train-tiny"
    assert json.loads((folder / "result.json").read_text()) == result
    again = thinkkv("train", "recipes/tiny.yaml", *ARGUMENTS, "--json")
    assert json.loads(again.out)["stages"] == result["stages"]
    assert again.err.count("finished before, skipped") == 4
    fresh = thinkkv("train", "recipes/tiny.yaml", *ARGUMENTS, "--resume", "never", "--set", "stages.0.args.max_steps=2")
    assert fresh.code == 0
    assert "skipped" not in fresh.err


@pytest.mark.slow
def test_a_dry_run_shows_everything_and_writes_nothing(thinkkv, tmp_path: Path) -> None:
    done = thinkkv("train", "tiny", "--dry-run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [stage["kind"] for stage in found["stages"]] == ["sft", "rejection_sampling", "sft", "scpo"]
    assert found["stages"][1]["sampled_tokens_at_most"] == 200 * 4 * 160
    assert found["recipe"]["stages"][3]["strength"] == 0.5
    assert min(found["bytes"].values()) > 0
    assert "hidden_size: 64" in done.err
    assert "<think>" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("stages.3.strenght=1", 2, "did you mean strength?"),
        ("stages.3.args.max_step=1", 2, "unknown key stages.3.args.max_step - did you mean max_steps?"),
        ("stages.3.args.qqq=1", 2, "unknown key stages.3.args.qqq - see TRL's GRPOConfig"),
        ("stages.0.args.learning_rate=fast", 2, "stages.0.args.learning_rate is 'fast' - write a number"),
        ("stages.0.args.output_dir=x", 2, "is set by the recipe"),
        ("stages.3.args.num_generations=7", 2, "tiny.yaml, line 54: stages.3.args: "),
        ("lora.lora_alfa=4", 2, "unknown key lora.lora_alfa - did you mean lora_alpha?"),
        ("lora.r=many", 2, "lora.r is 'many' - write a whole number"),
        ("lora.target_modules=[nothing]", 2, "lora does not fit the model: Target modules"),
        ("data.columns.promt=x", 2, "unknown key data.columns.promt - did you mean prompt?"),
        ("reward=exakt", 2, "no reward 'exakt'"),
        ("data.options.redundance=1", 2, "data.options: "),
        ("stages.3.args.loss_type=cispo", 2, "SCPO clips ratios on both sides"),
        ("stages.3.args.num_iterations=1", 2, "adaptive clipping is inert"),
    ],
)
def test_a_wrong_setting_is_one_line_before_any_work(thinkkv, override: str, code: int, message: str) -> None:
    done = thinkkv("train", "tiny", "--set", override, "--dry-run")
    assert done.code == code, done.err
    assert message in done.error


def test_vllm_is_configured_by_trl_s_own_setting(thinkkv) -> None:
    assert thinkkv("train", "tiny", "--set", "stages.3.args.use_vllm=true", "--dry-run").code == 0
    refused = thinkkv(
        "train", "tiny", "--set", "stages.3.args.use_vllm=true", "--set", "rollout.policy=task-kv", "--dry-run"
    )
    assert (refused.code, "vLLM samples with its own cache" in refused.error) == (2, True)


def test_a_missing_extra_is_named(thinkkv, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extras.importlib.util.find_spec
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "trl" else real(name))
    done = thinkkv("train", "tiny")
    assert done.code == 1
    assert "pip install 'thinkkv[train]'" in done.error


def test_an_unknown_recipe_and_an_unwritable_folder(thinkkv, tmp_path: Path) -> None:
    assert "packaged: " in thinkkv("train", "nothing.yaml").error
    (tmp_path / "file").touch()
    blocked = thinkkv("train", "tiny", "--out", tmp_path / "file" / "run")
    assert "choose another folder with --out" in blocked.error


def test_neither_the_sdk_nor_the_help_loads_trl() -> None:
    script = (
        "import sys, thinkkv.sdk\n"
        "from click.testing import CliRunner\n"
        "from thinkkv.sdk.cli import main\n"
        "for arguments in (['--help'], ['train', '--help']):\n"
        "    assert CliRunner().invoke(main, arguments).exit_code == 0\n"
        "print(sorted({'torch', 'trl', 'transformers', 'yaml', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_two_processes_run_a_recipe_together(tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--module"]
    command = [*run, "thinkkv.sdk.cli", "train", "tiny", *ARGUMENTS, "--out", str(tmp_path / "run"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert [stage["kind"] for stage in result["stages"]] == ["sft", "rejection_sampling", "sft", "scpo"]
    # Each process samples half of the prompts; the metrics are the first one's.
    assert [stage["steps"] for stage in result["stages"]] == [STEPS[0], STEPS[1] // 2, *STEPS[2:]]
