"""Bundles with operators in C: brought along or compiled here, and what is said where they cannot be had."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest
from onnx import TensorProto

from tests.export.baking import call
from tests.export.operators import one_node, runtime_of
from thinkkv.export.onnx import session
from thinkkv.export.onnx.cursor import step_cursor_node
from thinkkv.export.onnx.generate import settings_of
from thinkkv.export.onnx.native import LIBRARY_FILE, check_native, library_of
from thinkkv.export.onnx.session import Session
from thinkkv.kernels import task_kv_step
from thinkkv.kernels.c_library import FLAGS, _compiler
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.block import Block, LayerClasses
from thinkkv.sdk.manifest import verify, write_manifest

SOURCE = Path(task_kv_step.__file__).with_name("native.c")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, library: Path) -> tuple[Path, dict[str, Any]]:
    """Exported with ``--native``, and what the command said."""
    folder, profile = tmp_path_factory.mktemp("native") / "bundle", checkpoint.parent / "profile"
    options = ("--format", "onnx", "--native", "--ratio", "0.4", "--profile", str(profile), "--json")
    done = call("export", "--model", str(checkpoint), *options, "--out", str(folder))
    return folder, json.loads(done.stdout)


def test_the_library_is_part_of_the_bundle(bundle: tuple[Path, dict[str, Any]]) -> None:
    folder, result = bundle
    assert result["verified"]["greedy_tokens_equal"] is True
    assert LIBRARY_FILE in {file.path for file in verify(folder)}
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY_FILE


def test_float16_caches_take_half_and_say_the_same(
    bundle: tuple[Path, dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    options = (
        "--ratio",
        "0.4",
        "--profile",
        str(checkpoint.parent / "profile"),
        "--json",
        "--out",
        str(tmp_path / "o"),
    )
    half = ("--format", "onnx", "--native", "--cache-dtype", "float16")
    done = json.loads(call("export", "--model", str(checkpoint), *half, *options).stdout)
    assert done["verified"]["agreement"] > 0.9
    found, texts = [], []
    for folder in (bundle[0], tmp_path / "o"):
        _, slots = settings_of(folder)
        conversation = Session(folder, threads=1, native=True).start(150, slots)
        tokens = list(conversation.greedy(list(range(1, 90)), 40, set()))
        found.append(conversation.bytes)
        texts.append(tokens)
        model = onnxruntime_genai.Model(str(folder))
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=150, min_length=150, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.arange(1, 90, dtype=np.int32))
        for token in tokens:
            generator.generate_next_token()
            assert generator.get_next_tokens()[0] == token or token == 96  # it may not end here
    assert {name: 2 * size for name, size in found[1].items()} == found[0]
    assert np.mean(np.array(texts[0]) == np.array(texts[1])) > 0.8


def test_float16_caches_without_operators_in_c_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    options = (
        "--profile",
        str(checkpoint.parent / "profile"),
        "--cache-dtype",
        "float16",
        "--out",
        str(tmp_path / "o"),
    )
    done = call("export", "--model", str(checkpoint), "--format", "onnx", *options, code=1)
    assert "add --native" in " ".join(done.stderr.split())


@pytest.mark.parametrize("brings", [True, False])
def test_run_uses_the_bundles_library_or_compiles_one(
    bundle: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, library: Path, brings: bool
) -> None:
    folder, own = bundle[0], bundle[0] / LIBRARY_FILE
    content = own.read_bytes()
    used: list[Path] = []
    monkeypatch.setattr(session, "library_of", lambda folder: used.append(library_of(folder)) or used[-1])
    ask = ("run", str(folder), "--prompt", "what is it?", "--max-new-tokens", "5", "--json")
    plain = json.loads(call(*ask).stdout)
    assert used == []
    try:
        if not brings:
            own.unlink()
            write_manifest(folder)
        native = json.loads(call(*ask, "--native").stdout)
    finally:
        own.write_bytes(content)
        write_manifest(folder)
    assert used == [own if brings else library]
    assert native["text"] == plain["text"]


def test_a_changed_library_is_refused_before_it_is_loaded(bundle: tuple[Path, dict[str, Any]]) -> None:
    own = bundle[0] / LIBRARY_FILE
    content = own.read_bytes()
    own.write_bytes(content[:-1] + b"x")
    try:
        done = call("run", str(bundle[0]), "--prompt", "x", "--native", code=1)
    finally:
        own.write_bytes(content)
    assert "was changed since its export" in done.stderr


def test_without_a_compiler_it_says_so(
    bundle: tuple[Path, dict[str, Any]], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    options = ("--profile", str(checkpoint.parent / "profile"), "--ratio", "0.4", "--native")
    done = call(
        "export", "--model", str(checkpoint), "--format", "onnx", *options, "--out", str(tmp_path / "o"), code=1
    )
    assert "no-such-compiler cannot be run" in done.stderr
    assert not (tmp_path / "o").exists()
    assert "text" in json.loads(call("run", str(bundle[0]), "--prompt", "x", "--native", "--json").stdout)  # its own


@pytest.mark.parametrize("options", [("gguf",), ("safetensors",), ("onnx", "--provider", "cuda")])
def test_other_formats_and_providers_refuse_it(checkpoint: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    profile, out = str(checkpoint.parent / "profile"), str(tmp_path / "out")
    done = call(
        *("export", "--model", str(checkpoint), "--profile", profile, "--native", "--out", out, "--format", *options),
        code=1,
    )
    assert "drop --native" in done.stderr


def test_layers_that_it_does_not_serve_are_refused(bundle: tuple[Path, dict[str, Any]]) -> None:
    layers = Block.read(bundle[0]).layers
    check_native(layers)
    with pytest.raises(ExportError, match="every head keeps everything"):
        check_native([LayerClasses(**vars(layer) | {"full": layer.kv_heads}) for layer in layers])
    with pytest.raises(ExportError, match="of 12 dimensions - drop --native"):
        check_native([LayerClasses(**vars(layer) | {"head_dim": 12}) for layer in layers])


def test_the_cursor_in_c_knows_one_new_token(library: Path) -> None:
    feeds = {"input_ids": np.ones((1, 1), np.int64), "stock": np.array([False])}
    session = runtime_of(one_node(step_cursor_node("stock", "steps"), feeds, {"steps": TensorProto.BOOL}), library)
    assert session.run(None, feeds)[0].tolist() == [True]
    assert session.run(None, feeds | {"input_ids": np.ones((1, 2), np.int64)})[0].tolist() == [False]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors are not asked for their features")
def test_a_library_for_another_processor_is_refused_by_name(tmp_path: Path, library: Path) -> None:
    made = tmp_path / "other.so"
    a_processor_without_features = "-D__builtin_cpu_supports(feature)=0"
    options = (a_processor_without_features, "-mavx2", str(SOURCE), "-o", str(made), "-lm")
    subprocess.run([*_compiler(), *FLAGS, *options], check=True)
    with pytest.raises(Exception, match="compiled for a processor with avx2 - compile it here"):
        onnxruntime.SessionOptions().register_custom_ops_library(str(made))
