"""The recipes for models that need a GPU, run whole on a tiny one: every stage, with the recipe's own arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.recipes.short_run import Quiet
from tests.sdk.models.tiny_checkpoints import SIZES, byte_tokenizer
from thinkkv.recipes import config
from thinkkv.recipes.runner import run

SMALLER = (
    "data.eval_rows=2",
    "reward=tests.recipes.lenient_reward.some_right",
    "rollout.max_new_tokens=24",
    "rollout.batch_size=16",
    "stages.0.prompts=8",
    "stages.0.samples=4",
    "stages.1.args.gradient_accumulation_steps=2",
)
SHORTER = (
    "stages.2.args.max_steps=2",
    "stages.2.args.per_device_train_batch_size=4",
    "stages.2.args.gradient_accumulation_steps=2",
)
"""Of the last stage, where there is one beyond fine-tuning."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=0, bos_token_id=None)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("scpo.yaml", ["rejection_sampling", "sft", "scpo"]),
        ("grpo_length.yaml", ["rejection_sampling", "sft", "grpo"]),
        ("sft.yaml", ["rejection_sampling", "sft"]),
    ],
)
def test_it_runs_to_its_adapter(name: str, kinds: list[str], model: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    rows = ({"problem": f"{n} + 1?", "answer": str(n + 1)} for n in range(12))
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = (f"model.name={model}", f"data.source={problems}", *SMALLER, *(SHORTER if len(kinds) > 2 else ()))
    folder = tmp_path / "out"
    folder.mkdir()
    result = run(config.load(config.find(name), sizes), folder, Quiet())
    assert [stage["kind"] for stage in result["stages"]] == kinds
    assert all(stage["steps"] > 0 for stage in result["stages"])
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
