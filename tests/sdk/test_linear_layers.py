"""Which linear layers a patch changes, and that it gives them back."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import new_model
from thinkkv import sdk
from thinkkv.kernels.linear import native
from thinkkv.sdk.linear_layers import LinearLayers


def changed(model: nn.Module) -> set[str]:
    """Names of layers with a forward of their own."""
    return {name for name, layer in model.named_modules() if "forward" in vars(layer)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernel is called with."""
    found: list[Any] = []
    product = native.product
    monkeypatch.setattr(native, "product", lambda *arguments: found.append(arguments) or product(*arguments))
    return found


@torch.no_grad()
def test_a_decode_step_uses_the_kernel_for_every_linear_layer_and_nothing_stays(calls: list[Any]) -> None:
    model = new_model("qwen2", 2).eval()
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    token = torch.tensor([[3]])
    stock = model(token).logits
    with sdk.apply(model, policy="full"):
        assert changed(model) == linear
        found = model(token).logits
    assert len(calls) == len(linear)
    torch.testing.assert_close(found, stock)
    assert changed(model) == set()


@torch.no_grad()
def test_a_prompt_is_torchs(calls: list[Any]) -> None:
    model = new_model("llama", 2).eval()
    with sdk.apply(model, policy="full"):
        model(torch.randint(0, 50, (1, 64)), logits_to_keep=0)
    assert calls == []


def test_training_goes_on_as_before(calls: list[Any]) -> None:
    model = new_model("llama", 2).train()
    with sdk.apply(model, policy="full"):
        model(torch.tensor([[3, 4]])).logits.sum().backward()
    assert calls == []
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_another_library_has_wrapped_stays_its_own() -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    theirs = MethodType(lambda layer, inputs: inputs + 1, layers[0])
    layers[0].forward = theirs  # type: ignore[method-assign]
    ours = LinearLayers(layers)
    assert layers[0].forward == theirs
    later = MethodType(lambda layer, inputs: inputs - 1, layers[1])
    layers[1].forward = later  # type: ignore[method-assign]
    ours.restore()
    assert (layers[0].forward, layers[1].forward) == (theirs, later)


@torch.no_grad()
def test_a_deep_copy_computes_with_its_own_weights() -> None:
    model = new_model("llama", 2).eval()
    with sdk.apply(model, policy="full"):
        copied = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert copied(torch.tensor([[3]])).logits.abs().sum() > 0


def test_without_the_kernel_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINKKV_KERNELS", "torch")
    model = new_model("llama", 2)
    with sdk.apply(model, policy="full"):
        assert changed(model) == set()
