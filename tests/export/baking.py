"""Models with uneven head profiles, for the export tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

from tests.tiny_models import prompts
from thinkkv.patches.registry import shapes_of
from thinkkv.sdk.cli import main
from thinkkv.sdk.policies import TaskKV
from thinkkv.sdk.profile import HeadProfile, fingerprint_of

SMALL = TaskKV(sinks=4, recent=8, observation_window=8, beta=0.5)
"""Task-KV at the scale of the tiny models: two of four KV heads full at the bottom, one at the top."""


def profile_of(model: Any, *, score: str = "distance", best_layer: int | None = None) -> HeadProfile:
    """A made-up profile of this model, in which every layer ranks its heads differently.

    Args:
        model: whose heads.
        score: kind of the scores.
        best_layer: where all heads score above those of the other layers.
    """
    shapes = shapes_of(model)
    draw = torch.Generator().manual_seed(0)
    scores = tuple(
        tuple((torch.rand(shape.kv_heads, generator=draw) + (layer == best_layer)).tolist())
        for layer, shape in enumerate(shapes)
    )
    return HeadProfile(
        score=score,
        scores=scores,
        heterogeneous=tuple((max(range(len(row)), key=row.__getitem__),) for row in scores),
        fingerprint=fingerprint_of(model),
        calibration={"prompts": 0, "sha256": "made up"},
    )


def dense_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def adapter_of(model: Any, folder: Path, base: str = "tiny-base") -> Any:
    """A LoRA adapter with random weights, and the logits that it should give."""
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    wrapped.peft_config["default"].base_model_name_or_path = base
    wrapped.save_pretrained(folder)
    return dense_logits(wrapped, prompts((63,)).ids)


def call(*arguments: str, code: int = 0) -> Any:
    """Run the command line; its exit code is checked."""
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == code, done.output
    return done
