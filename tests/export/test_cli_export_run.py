"""``thinkkv export`` and ``thinkkv run``, as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.baking import call
from thinkkv import sdk
from thinkkv.export.onnx import session
from thinkkv.patches.errors import BundleError
from thinkkv.sdk import extras, generate_text, models
from thinkkv.sdk.manifest import verify, write_manifest
from thinkkv.sdk.outputs import finish


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """What the bare command exports after a patch in the same folder."""
    work = checkpoint.parent
    (work / "thinkkv-out" / "patch-tiny").mkdir(parents=True)
    patched = {"model": str(checkpoint), "policy": "task-kv", "ratio": 0.4, "budget": None}
    finish(work / "thinkkv-out" / "patch-tiny", patched | {"profile": str(work / "profile")})
    before = Path.cwd()
    os.chdir(work)
    try:
        done = call("export", "--format", "onnx", "--json")
        return work / json.loads(done.stdout)["folder"], json.loads(done.stdout)
    finally:
        os.chdir(before)


def test_the_bare_command_exports_the_newest_patch(bundle: tuple[Path, dict[str, Any]]) -> None:
    folder, result = bundle
    assert result["format"] == "onnx"
    assert result["verified"]["greedy_tokens_equal"] is True
    assert result["verified"]["compared"] >= 32
    assert {file["path"]: file["sha256"] for file in result["files"]} == {
        file.path: file.sha256 for file in verify(folder)
    }
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "thinkkv.json"} <= {
        file["path"] for file in result["files"]
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("onnx", "block_size"), "'block_size' is no builder option - write it as KEY=VALUE"),
        (("onnx", "prune_lm_head=false"), "prune_lm_head is fixed: a bundle's graph depends on it"),
        (("gguf", "block_size=16"), "builder options belong to ONNX - drop --builder-option"),
    ],
    ids=["no pair", "fixed", "another format"],
)
def test_builder_options_that_cannot_be_followed_are_refused(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, str], said: str
) -> None:
    format_, option = arguments
    profile, out = str(checkpoint.parent / "profile"), tmp_path / "out"
    done = call(
        *("export", "--model", str(checkpoint), "--profile", profile, "--format", format_),
        *("--builder-option", option, "--out", str(out)),
        code=1,
    )
    assert said in " ".join(done.stderr.split())
    assert not out.exists()


def test_run_answers_without_torch(bundle: tuple[Path, dict[str, Any]]) -> None:
    code = (
        "import sys; from thinkkv.sdk.cli import main\n"
        f"try: main(['run', {str(bundle[0])!r}, '--prompt', 'what is it?', '--max-new-tokens', '5', '--json'])\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["prompt_tokens"] == 11
    assert 1 <= result["new_tokens"] <= 5
    assert set(result["seconds"]) == {"prefill", "decode"}
    held = result["bytes"]
    assert held["used"] == held["planned"] <= held["promised"] <= held["full"]


def test_a_changed_bundle_is_refused_before_it_is_loaded(bundle: tuple[Path, dict[str, Any]]) -> None:
    path = bundle[0] / "genai_config.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"4", b"5", 1))
    try:
        done = call("run", str(bundle[0]), "--prompt", "x", code=1)
    finally:
        path.write_bytes(content)
    assert "was changed since its export" in done.stderr
    assert "Traceback" not in done.stderr


def newer_schema(content: dict[str, Any]) -> None:
    content["schema"] = 99


def unknown_slots(content: dict[str, Any]) -> None:
    content["onnx"]["slots"]["rings"] = 3


@pytest.mark.parametrize(("harm", "said"), [(newer_schema, "upgrade thinkkv"), (unknown_slots, "rings")])
def test_a_bundle_that_says_what_is_not_known_here_is_not_run(
    bundle: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Any, said: str
) -> None:
    folder = shutil.copytree(bundle[0], tmp_path / "copy")
    content = json.loads((folder / "thinkkv.json").read_text())
    harm(content)
    (folder / "thinkkv.json").write_text(json.dumps(content))
    write_manifest(folder)
    monkeypatch.setattr(session, "Session", None)
    stderr = call("run", str(folder), "--prompt", "x", code=1).stderr
    assert said in " ".join(stderr.split())
    assert len([line for line in stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in stderr


def test_nothing_is_overwritten(bundle: tuple[Path, dict[str, Any]], checkpoint: Path) -> None:
    done = call("export", "--model", str(checkpoint), "--format", "gguf", "--out", str(bundle[0]), code=1)
    assert "--force" in done.stderr
    assert verify(bundle[0])


def test_nothing_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "thinkkv patch" in call("export", "--format", "onnx", code=1).stderr


@pytest.fixture(scope="module")
def baked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An exported checkpoint, and what the command said."""
    out, profile = tmp_path_factory.mktemp("baked") / "out", checkpoint.parent / "profile"
    options = ["--profile", str(profile), "--budget", "300", "--out", str(out), "--json"]
    done = call("export", "--model", str(checkpoint), "--format", "safetensors", *options)
    return out, json.loads(done.stdout)


def test_a_checkpoint_is_exported_and_verified(baked: tuple[Path, dict[str, Any]]) -> None:
    assert baked[1]["verified"]["greedy_tokens_equal"] is True
    assert "no ONNX bundle" in call("run", str(baked[0]), "--prompt", "x", code=1).stderr


GENERATED: dict[str, tuple[list[str], dict[str, Any]]] = {
    "as baked": ([], {"policy": "task-kv", "ratio": None, "budget": 300, "profile": True}),
    "other ratio": (["--ratio", "0.9"], {"policy": "task-kv", "ratio": 0.9, "budget": None, "profile": True}),
    "other policy": (["--policy", "full"], {"policy": "full", "ratio": None, "budget": 300, "profile": False}),
}


@pytest.mark.parametrize("case", GENERATED)
def test_generate_uses_what_was_baked(
    baked: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    options, expected = GENERATED[case]
    real, used = generate_text.apply, dict[str, Any]()
    monkeypatch.setattr(generate_text, "apply", lambda model, **named: used.update(named) or real(model, **named))
    call("generate", "--model", str(baked[0]), "--prompt", "what is it?", "--max-new-tokens", "3", *options)
    used["profile"] = used["profile"] is not None
    assert {name: used[name] for name in expected} == expected


def change(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(path.read_bytes().replace(b"4", b"5", 1))


def newer(folder: Path, file: str) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))


def newer_block(folder: Path) -> None:
    newer(folder, "thinkkv.json")
    write_manifest(folder)


def leaving(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("config.json", "../config.json", 1))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (change, "was changed since its export"),
    "missing": (lambda folder: (folder / "generation_config.json").unlink(), "lacks generation_config.json"),
    "extra": (lambda folder: (folder / "more.py").write_text("x"), "holds more.py"),
    "leaving": (leaving, "leaves the folder"),
    "newer manifest": (lambda folder: newer(folder, "manifest.json"), "upgrade thinkkv"),
    "newer block": (newer_block, "upgrade thinkkv"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_before_it_is_loaded(
    baked: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    harm, message = DAMAGES[damage]
    folder = shutil.copytree(baked[0], tmp_path / "copy")
    harm(folder)
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(BundleError, match=message):
        sdk.load(folder)
    stderr = call("generate", "--model", str(folder), "--prompt", "x", code=1).stderr
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_missing_extra_is_named(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = extras.importlib.util.find_spec
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else real(name))
    options = ["--format", "onnx", "--out", str(tmp_path / "out")]
    done = call("export", "--model", str(checkpoint), *options, code=1)
    assert "pip install 'thinkkv[export]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_helping_and_importing_load_no_onnx() -> None:
    code = (
        "import sys, thinkkv.sdk; from thinkkv.sdk.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'onnx', 'onnxruntime', 'gguf', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
