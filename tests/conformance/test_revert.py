"""Invariant 4: after ``revert`` nothing tells that the model was ever patched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from tests.conformance.decoding import Conversation, decoded, random_tokens
from tests.conformance.small_policies import NAMES, small_policy
from tests.tiny_models import KV_HEADS, VARIANTS, Batch, Case, new_model
from thinkkv import sdk


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, bytes]:
    return tensor.dtype, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def inventory(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch could have touched, in comparable form."""
    config = model.config
    return {
        "state dict": {name: bits(tensor) for name, tensor in model.state_dict().items()},
        "buffers": {name: bits(tensor) for name, tensor in model.named_buffers()},
        "training": [module.training for module in model.modules()],
        "requires grad": [parameter.requires_grad for parameter in model.parameters()],
        "config": copy.deepcopy(config.to_dict()),
        "generation config": copy.deepcopy(model.generation_config.to_dict()),
        "attention": config._attn_implementation,
        "config attributes": copy.deepcopy(vars(config)),
        "attributes": {name: list(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            f"{name}.{attribute}": (type(hooks), list(hooks.items()))
            for name, module in model.named_modules()
            for attribute, hooks in vars(module).items()
            if "hooks" in attribute and isinstance(hooks, Mapping)
        },
        "methods": [
            (getattr(module, method).__func__, getattr(module, method).__self__ is module)
            for module in model.modules()
            for method in ("forward", "__call__", "generate", "generate_batch", "prepare_inputs_for_generation")
            if hasattr(module, method)
        ],
        "classes": {cls: class_attributes(cls) for cls in class_tree(model)},
    }


def class_tree(model: nn.Module) -> set[type]:
    return {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}


def class_attributes(cls: type) -> dict[str, Any]:
    # transformers' own memo of an answer that never changes, left by the first set_attn_implementation of a class.
    return {name: value for name, value in vars(cls).items() if name != "_can_set_attn_implementation_cached_value"}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for aspect, value in expected.items():
        assert found[aspect] == value, f"{aspect} differs"


def greedy(model: Any, batch: Batch) -> list[list[int]]:
    return model.generate(batch.ids, attention_mask=batch.mask, max_new_tokens=6, do_sample=False).tolist()


# Head counts and policies in turn: what a patch touches depends on the family alone.
REVERTED = [
    (variant, KV_HEADS[i % len(KV_HEADS)], NAMES[i % len(NAMES)], dtype)
    for i, variant in enumerate(VARIANTS)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("variant", "kv_heads", "policy", "dtype"), REVERTED, ids=str)
def test_revert_restores_every_bit(variant: str, kv_heads: int, policy: str, dtype: torch.dtype) -> None:
    case = Case(variant, kv_heads, dtype, (40, 25))
    model, steps = new_model(variant, kv_heads, dtype), random_tokens(2, 3)
    tokens, logits = greedy(model, case.batch()), decoded(model, case.batch(), steps)
    before = inventory(model)
    handle = sdk.apply(model, policy=small_policy(policy, kv_heads), ratio=0.5)
    assert handle.active
    assert inventory(model)["attention"] != before["attention"]
    decoded(model, case.batch(), steps)
    greedy(model, case.batch())
    Conversation(model, handle.new_cache()).feed(case.batch())
    handle.revert()
    assert not handle.active
    assert_same(inventory(model), before)
    assert torch.equal(decoded(model, case.batch(), steps), logits)
    assert greedy(model, case.batch()) == tokens
    handle.revert()
    assert_same(inventory(model), before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_revert_gives_back_the_attention_that_was_chosen(attention: str) -> None:
    model = new_model("qwen3-mixed", 2)
    model.set_attn_implementation(attention)
    before = inventory(model)
    with sdk.apply(model, policy="snapkv"):
        pass
    assert model.config._attn_implementation == attention
    assert_same(inventory(model), before)


def test_an_error_inside_the_context_reverts_too() -> None:
    model = new_model("llama", 4)
    before = inventory(model)
    with pytest.raises(RuntimeError, match="in the user's code"), sdk.apply(model):
        raise RuntimeError("in the user's code")
    assert_same(inventory(model), before)


def test_a_refused_patch_leaves_the_model_alone() -> None:
    model = new_model("mistral", 4)
    before = inventory(model)
    with pytest.raises(sdk.BudgetError):
        sdk.apply(model, ratio=3)
    with pytest.raises(sdk.BudgetError):
        sdk.apply(model, policy="no-such-policy")
    assert_same(inventory(model), before)


def test_a_refused_prompt_can_be_followed_by_revert() -> None:
    case = Case("mistral-window", kv_heads=2, lengths=(60,))
    model = new_model("mistral-window", 2)
    before = inventory(model)
    with (
        sdk.apply(model, policy=small_policy("task-kv", 2), ratio=0.1),
        pytest.raises(sdk.BudgetError),
    ):
        greedy(model, case.batch())
    assert_same(inventory(model), before)


def test_a_model_in_training_mode_stays_in_it() -> None:
    model = new_model("llama", 2).train()
    before = inventory(model)
    with sdk.apply(model):
        assert model.training
    assert_same(inventory(model), before)


def test_attributes_that_a_user_put_on_the_instance_come_back() -> None:
    model = new_model("llama", 2)

    def generate(*args: Any, **kwargs: Any) -> str:
        return "the user's own"

    model.generate = generate
    with sdk.apply(model):
        assert model.generate is not generate
    assert model.generate is generate


def test_one_of_two_models_is_patched_alone() -> None:
    patched, other = new_model("qwen2", 2), new_model("qwen2", 2)
    before = inventory(other)
    with sdk.apply(patched, policy="snapkv"):
        assert_same(inventory(other), before)


@pytest.mark.parametrize("outer", [True, False], ids=["wrapper", "inner model"])
def test_a_peft_model_is_restored(outer: bool) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'thinkkv[train]'")
    wrapped = peft.get_peft_model(
        new_model("qwen3", 2), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    case = Case("qwen3", kv_heads=2, lengths=(40, 25))
    inner = wrapped.get_base_model()
    before, tokens = inventory(inner), greedy(wrapped, case.batch())
    with sdk.apply(wrapped if outer else inner, policy=small_policy("task-kv", 2), ratio=1.0):
        assert greedy(wrapped, case.batch()) == tokens
    assert_same(inventory(inner), before)
    assert greedy(wrapped, case.batch()) == tokens
