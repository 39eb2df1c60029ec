"""The command line as a whole: its start, its errors, and ``thinkkv doctor``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result

from thinkkv import sdk
from thinkkv.sdk import cli
from thinkkv.sdk.model_sources import ALIASES

HEAVY = ("torch", "transformers", "numpy", "matplotlib", "trl", "onnx", "onnxruntime", "triton", "huggingface_hub")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("thinkkv")
    return subprocess.run(
        [script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- Start


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["patch", "--help"], ["generate", "-h"]], ids=" ".join
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from thinkkv.sdk.cli import main
try:
    main({arguments!r})
except SystemExit as exit:
    assert not exit.code
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_help_lists_the_commands_as_they_describe_themselves() -> None:
    shown = run("--help").stdout
    for name, (_, line) in cli.COMMANDS.items():
        assert f"{name} " in shown
        assert line in shown
        own = run(name, "--help")
        assert line in own.stdout
        assert "Examples:" in own.stdout


def test_the_version_is_the_distributions() -> None:
    assert run("--version").stdout == f"thinkkv, version {metadata.version('thinkkv')}\n"


def test_no_command_shows_the_help() -> None:
    done = run()
    assert done.exit_code == 2
    assert "Usage: thinkkv" in done.output


# --- Errors


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bogus"], "error: No such option '--bogus' - see thinkkv --help"),
        (["bogus"], "error: No such command 'bogus' - see thinkkv --help"),
        (["patch"], "error: Missing option '--model' - see thinkkv patch --help"),
        (["doctor", "extra"], "error: Got unexpected extra argument (extra) - see thinkkv doctor --help"),
        (
            ["patch", "--model", "x", "--ratio", "0"],
            "error: Invalid value for '--ratio': 0.0 is not in the range 0<x<=1 - see thinkkv patch --help",
        ),
        (
            ["patch", "--model", "x", "--ratio", "3"],
            "error: Invalid value for '--ratio': 3.0 is not in the range 0<x<=1 - see thinkkv patch --help",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_line_and_exit_2(arguments: list[str], line: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"{line}\n")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A command ``fail`` that raises what a test puts here."""
    raises: list[BaseException] = []

    @click.command("fail")
    def fail() -> None:
        raise raises[0]

    monkeypatch.setattr(sys.modules[__name__], "fail", fail, raising=False)
    monkeypatch.setitem(cli.COMMANDS, "fail", (f"{__name__}:fail", "Fail."))
    monkeypatch.setattr("thinkkv.sdk.cli.console.quiet_libraries", lambda: None)
    return raises


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (sdk.ModelNotFoundError("no model - get one"), 1, "error: no model - get one"),
        (sdk.BudgetError("too small - use more"), 2, "error: too small - use more"),
        (sdk.ThinkKVError("two\n  lines - join"), 1, "error: two lines - join"),
        (ValueError("odd"), 1, "error: unexpected ValueError: odd - rerun with --debug"),
        (KeyboardInterrupt(), 130, "error: interrupted - run the command again to start over"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failure_is_one_line(failing: list[BaseException], error: BaseException, code: int, line: str) -> None:
    failing.append(error)
    done = run("fail")
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"{line}\n")


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback_before_the_line(failing: list[BaseException], arguments: list[str]) -> None:
    failing.append(sdk.ModelNotFoundError("no model - get one"))
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("\nerror: no model - get one\n")


def test_debug_of_one_call_does_not_stay(failing: list[BaseException]) -> None:
    failing.append(sdk.ModelNotFoundError("no model - get one"))
    run("fail", "--debug")
    assert "Traceback" not in run("fail").stderr


def test_a_model_that_cannot_be_had_is_one_line_within_ten_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    done = process(
        *("patch", "--model", "qwen2-7b"),
        HF_HOME=str(tmp_path),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="",
        TRANSFORMERS_OFFLINE="",
    )
    assert time.monotonic() - start < 10
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: qwen2-7b (Qwen/Qwen2-7B-Instruct) is not in the local cache and http://127.0.0.1:9 cannot be reached - "
        "check the network, or name a checkpoint folder or GGUF file\n"
    )


# --- Doctor


@pytest.fixture(scope="module")
def examined() -> dict[str, object]:
    done = process("doctor", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def test_doctor_names_versions_and_device(examined: dict) -> None:
    assert examined["thinkkv"] == metadata.version("thinkkv")
    assert examined["versions"]["torch"] == metadata.version("torch")
    assert examined["device"]["kind"] in ("cuda", "rocm", "mps", "cpu")
    assert examined["device"]["threads"] >= 1


def test_doctor_says_which_kernels_run_and_why(examined: dict) -> None:
    kernels = {kernel["operation"]: kernel for kernel in examined["kernels"]}
    assert set(kernels) == {"window_scores", "semantic_vector", "compact", "append", "ragged_decode", "linear"}
    if not torch.cuda.is_available():
        native = {name for name, kernel in kernels.items() if kernel["backend"] == "native"}
        assert native == {"append", "ragged_decode", "linear"}
        assert "cpu tensors" in kernels["append"]["reason"]


def test_doctor_lists_what_is_supported(examined: dict) -> None:
    assert set(examined["architectures"]) >= {"llama", "qwen2", "qwen3", "mistral"}
    assert examined["policies"] == list(sdk.POLICIES)
    assert [model["alias"] for model in examined["models"]] == list(ALIASES)


def test_doctor_says_how_to_get_what_is_missing(examined: dict) -> None:
    extras = {extra["extra"]: extra for extra in examined["extras"]}
    assert set(extras) == {"demo", "train", "gym", "harness", "export", "gpu", "dev"}
    assert extras["train"]["install"] == "pip install 'thinkkv[train]'"
    for extra in extras.values():
        assert all(examined["versions"][name] is None for name in extra["missing"])
    assert "pytest" not in extras["dev"]["missing"]


def test_doctor_knows_which_models_are_here(tmp_path: Path) -> None:
    done = process("doctor", "--json", HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path))
    states = {model["alias"]: model["status"] for model in json.loads(done.stdout)["models"]}
    assert states.pop("smollm2-135m") in ("packaged", "needs pip install 'thinkkv[demo]'")
    assert set(states.values()) == {"to download"}


def test_doctor_shows_tables_on_stdout(examined: dict) -> None:
    """As narrow as a terminal is."""
    done = process("doctor", COLUMNS="80")
    assert done.returncode == 0
    assert "pip install 'thinkkv[train]'" in done.stdout or "trl" not in str(examined["extras"])
    for name in ("smollm2-135m", "qwen3-0.6b", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "task-kv", "mistral"):
        assert name in done.stdout
