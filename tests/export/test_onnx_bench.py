"""``thinkkv bench --runtime onnx``: rows of bundles, each made of what the row says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.baking import call, profile_of
from thinkkv.sdk.block import Block

POLICIES = "full,task-kv,task-kv+sinks=4+recent=24"


def rows(checkpoint: Path, profile: Path, *more: str, policies: str = POLICIES) -> list[dict[str, Any]]:
    """Of a short run into ``out``."""
    call_ = ["bench", "--runtime", "onnx", "--model", str(checkpoint), "--profile", str(profile), "--out", "out"]
    options = ["--policies", policies, "--ratio", "0.9", "--contexts", "400", "--threads", "1", "--new-tokens", "4"]
    done = call(*call_, *options, "--prefills", "1", *(more or ["--no-memory"]), "--json")
    found: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    return found


def bundles() -> dict[str, Block]:
    """What was exported, by folder."""
    return {folder.name: Block.read(folder) for folder in Path("out/bundles").iterdir()}


def test_rows_name_the_options_and_bundles_follow_them(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = checkpoint.parent / "profile"
    found = rows(checkpoint, profile)
    assert [(row["runtime"], row["policy"]) for row in found] == [("onnx", name) for name in POLICIES.split(",")]
    full, *compressed = (row["used_bytes"] for row in found)
    assert all(used < full for used in compressed)
    assert all(row["decode_tokens_per_second"] > 0 < row["prefill_seconds"] for row in found)
    options = {block.options.get("recent") for block in bundles().values() if block.policy == "task-kv"}
    assert options == {256, 24}
    before = {path: path.stat().st_mtime_ns for path in Path("out/bundles").glob("*/model.onnx")}
    rows(checkpoint, profile)
    assert before == {path: path.stat().st_mtime_ns for path in Path("out/bundles").glob("*/model.onnx")}


def test_native_measures_bounded_bundles_twice(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = rows(checkpoint, checkpoint.parent / "profile", "--native", "--no-memory", policies="full,task-kv")
    assert [(row["runtime"], row["policy"]) for row in found] == [
        ("onnx", "full"),
        ("onnx", "task-kv"),
        ("onnx-native", "task-kv"),
    ]
    assert found[1]["cache_bytes"] == found[2]["cache_bytes"] < found[0]["cache_bytes"]
    assert "--runtime onnx" in call("bench", "--native", code=2).stderr


def test_another_model_or_profile_is_another_bundle(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(checkpoint, checkpoint.parent / "profile", policies="task-kv")
    first = bundles()
    other = shutil.copytree(checkpoint, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.neg_()
    model.save_pretrained(other)
    rows(other, profile_of(model).save(tmp_path / "profile"), policies="task-kv")
    second = {name: block for name, block in bundles().items() if name not in first}
    assert len(second) == len(first)
    fingerprints = [{block.source["fingerprint"]["weights"] for block in some.values()} for some in (first, second)]
    assert [len(found) for found in fingerprints] == [1, 1]
    assert fingerprints[0] != fingerprints[1]


@pytest.mark.slow
def test_peak_memory_of_a_bundle_comes_from_a_process_without_torch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = rows(checkpoint, checkpoint.parent / "profile", "--memory", policies="task-kv")
    assert all(20 * 2**20 < row["peak_rss_bytes"] < 2 * 2**30 for row in found)
