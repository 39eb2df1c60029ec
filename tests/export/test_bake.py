"""Baking changes the order of the heads and nothing that a dense model says."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.export.baking import SMALL, adapter_of, dense_logits, profile_of
from tests.tiny_models import new_model, prompts
from thinkkv import sdk
from thinkkv.export.bake import bake
from thinkkv.export.safetensors import write_checkpoint
from thinkkv.patches.errors import AdapterMismatchError, ExportError
from thinkkv.sdk.block import Block
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.policies import EvidenceKV, SnapKV

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "llama3")


def baked(model: Any, tokenizer: Any = None, **options: Any) -> Any:
    options.setdefault("budget", Budget(ratio=0.6))
    return bake(model, tokenizer, policy=SMALL, profile=profile_of(model), context=128, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_stay_equal(family: str) -> None:
    model, ids = new_model(family, 4), prompts((63,)).ids
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    before = dense_logits(model, ids)
    done = baked(model)
    assert any(list(layer.order) != sorted(layer.order) for layer in done.block.layers)
    after = dense_logits(done.model, ids)
    assert (after - before).abs().max() < 1e-5
    assert torch.equal(after.argmax(-1), before.argmax(-1))


def test_full_heads_come_first() -> None:
    model = new_model("llama", 4)
    profile = profile_of(model)
    done = baked(model)
    for layer, row in zip(done.block.layers, profile.scores, strict=True):
        farthest = max(range(4), key=row.__getitem__)
        assert layer.full >= 1
        assert farthest in layer.order[: layer.full]
    assert [layer.full for layer in done.block.layers] == [2, 2, 1]


def test_the_promise_holds_at_the_context() -> None:
    block = baked(new_model("llama", 4), budget=Budget(ratio=0.6)).block
    stored = sum(layer.full * 128 + (layer.kv_heads - layer.full) * block.kept for layer in block.layers)
    assert stored <= 0.6 * 3 * 4 * 128


def test_a_policy_that_decides_per_prompt_cannot_be_baked() -> None:
    with pytest.raises(ExportError, match="snapkv"):
        bake(new_model("llama", 4), None, policy=SnapKV(), budget=Budget(ratio=0.9), context=128)


def test_heads_that_share_tokens_by_the_prompt_are_refused() -> None:
    policy = EvidenceKV(head_scores=((0.1, 0.2, 0.3, 0.4),) * 3, sinks=2, recent=6, observation_window=4)
    with pytest.raises(ExportError, match="evidence-kv tells heads or tokens apart per prompt"):
        bake(new_model("llama", 4), None, policy=policy, budget=Budget(ratio=0.5), context=128)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_checkpoint_loads_stock_and_patched(family: str, char_tokenizer: Any, tmp_path: Path) -> None:
    model, ids = new_model(family, 4), prompts((100,)).ids
    profile = profile_of(model)
    with sdk.apply(copy.deepcopy(model), policy="task-kv", budget=60, profile=profile) as handle:
        expected = handle._model.generate(ids, max_new_tokens=8, do_sample=False)
    before = dense_logits(model, ids)
    done = bake(
        model, char_tokenizer, policy=sdk.POLICIES["task-kv"](), budget=Budget(tokens=60), profile=profile, context=100
    )
    write_checkpoint(done, tmp_path)

    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (dense_logits(stock, ids) - before).abs().max() < 1e-5

    loaded, _ = sdk.load(tmp_path)
    assert sdk.handle_of(loaded).budget.tokens == 60
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), expected)
    assert Block.read(tmp_path) == done.block
    assert json.loads((tmp_path / "config.json").read_text())["thinkkv"]["policy"] == "task-kv"


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    model = new_model("llama", 4)
    expected = adapter_of(model, tmp_path)
    done = baked(model, adapter=tmp_path, label="somewhere/tiny-base")
    found = dense_logits(done.model, prompts((63,)).ids)
    assert (found - expected).abs().max() < 1e-4
    assert not [name for name, _ in done.model.named_parameters() if "lora" in name]


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model = new_model("llama", 4)
    adapter_of(model, tmp_path)
    with pytest.raises(AdapterMismatchError, match="trained on tiny-base, not on other"):
        baked(model, adapter=tmp_path, label="other")


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    adapter_of(new_model("llama", 8), tmp_path)
    with pytest.raises(AdapterMismatchError, match="does not fit"):
        baked(new_model("llama", 4), adapter=tmp_path, label="tiny-base")


def test_a_folder_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="no PEFT adapter"):
        baked(new_model("llama", 4), adapter=tmp_path, label="tiny-base")


@pytest.mark.slow
def test_dense_logits_of_a_real_model_stay_equal(smollm2: Any) -> None:
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    text = (Path(sdk.__path__[0]) / "prompts" / "demo.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :500]
    exact = copy.deepcopy(model).double()
    before, exact_before = dense_logits(model, ids), dense_logits(exact, ids)
    policy, budget, profile = sdk.POLICIES["task-kv"](), Budget(ratio=0.5), profile_of(model)
    done = bake(model, tokenizer, policy=policy, budget=budget, profile=profile)
    assert any(list(layer.order) != sorted(layer.order) for layer in done.block.layers)
    after = dense_logits(done.model, ids)
    # Adding up in another order rounds differently; by as much as float32 differs from float64 anyway.
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert (after - before).abs().max() < 2 * (before - exact_before).abs().max()
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    assert (dense_logits(done.model.double(), ids) - exact_before).abs().max() < 1e-5


def test_a_cache_in_another_dtype_is_the_runtimes_own_business() -> None:
    model = new_model("llama", 4)
    with pytest.raises(ExportError, match="without cache_dtype"):
        bake(
            model, None, policy=replace(SMALL, cache_dtype="int8"), budget=Budget(ratio=0.6), profile=profile_of(model)
        )
