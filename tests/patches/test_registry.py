"""The registry: what it knows, what it refuses, and a family added by one file plus one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

import thinkkv.patches
from thinkkv import sdk
from thinkkv.patches import registry
from thinkkv.patches.architecture import Architecture, LayerShape, Projections, probe
from thinkkv.patches.registry import architectures, register, shapes_of, unregister

BUILT_IN = ("llama", "mistral", "qwen2", "qwen3")
QKVO = Projections(q="q_proj", k="k_proj", v="v_proj", o="o_proj")


def small_config(model_type: str, **options: Any) -> Any:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(model_type, **sizes | options)


def small_model(model_type: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(small_config(model_type, **options)).eval()


@pytest.mark.parametrize("model_type", BUILT_IN)
def test_family_is_known_and_fits_its_code(model_type: str) -> None:
    architecture = architectures()[model_type]
    assert architecture.model_type == model_type
    shapes = probe(architecture, small_model(model_type, sliding_window=None))
    assert shapes == (LayerShape(query_heads=4, kv_heads=2, head_dim=8, window=None),) * 2


def test_nothing_else_is_built_in() -> None:
    assert sorted(architectures()) == sorted(BUILT_IN)


def test_the_view_of_the_registry_is_read_only() -> None:
    with pytest.raises(TypeError):
        architectures()["gpt2"] = architectures()["llama"]  # type: ignore[index]


def test_an_unknown_architecture_is_told_what_is_supported() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    )
    with pytest.raises(sdk.UnsupportedModelError) as caught:
        sdk.apply(model)
    assert "gpt2" in str(caught.value)
    assert all(model_type in str(caught.value) for model_type in BUILT_IN)


def test_what_is_no_transformers_model_is_named() -> None:
    with pytest.raises(sdk.UnsupportedModelError, match="Linear is no transformers model"):
        sdk.apply(nn.Linear(2, 2))


def test_a_name_is_taken_once() -> None:
    with pytest.raises(sdk.UnsupportedModelError, match="'llama' is registered already"):
        register(architectures()["llama"])


@pytest.mark.parametrize(
    ("architecture", "explanation"),
    [
        (Architecture("gemma", "GemmaAtention", QKVO), "no class GemmaAtention"),
        (Architecture("gemma", "GemmaAttention", replace(QKVO, q_norm="q_norm")), "GemmaAttention has no q_norm"),
        (Architecture("gemma", "GemmaAttention", replace(QKVO, k="key", v="value")), "has no key, value"),
        (Architecture("gemmma", "GemmaAttention", QKVO), "gemmma"),
        (Architecture("gemmma", "GemmaAttention", QKVO, module="transformers.models.gemma.modeling_gemma"), "gemmma"),
    ],
    ids=["unknown-class", "missing-norm", "missing-projections", "unknown-module", "unknown-config"],
)
def test_data_that_does_not_fit_is_refused_and_not_kept(architecture: Architecture, explanation: str) -> None:
    with pytest.raises(sdk.UnsupportedModelError, match=explanation):
        register(architecture)
    assert architecture.model_type not in architectures()


@pytest.mark.parametrize(
    ("model_type", "options", "windows"),
    [
        ("mistral", {"sliding_window": 16}, (16, 16)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (None, 16)),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 16}, (None, None)),
    ],
    ids=["mistral-window", "mistral-none", "qwen2-upper-layers", "qwen3-switched-off"],
)
def test_probe_finds_the_sliding_window_of_each_layer(
    model_type: str, options: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    model = small_model(model_type, **options)
    assert tuple(shape.window for shape in shapes_of(model)) == windows


def test_a_layer_sees_what_its_window_leaves_to_the_next_query() -> None:
    windowed = LayerShape(query_heads=4, kv_heads=2, head_dim=8, window=16)
    assert [windowed.visible(tokens) for tokens in (0, 14, 15, 16, 100)] == [0, 14, 15, 15, 15]
    assert replace(windowed, window=None).visible(100) == 100


def test_probe_refuses_a_model_that_lost_a_layer() -> None:
    model = small_model("llama")
    model.model.layers = model.model.layers[:1]
    with pytest.raises(sdk.UnsupportedModelError, match="found 1 modules of class LlamaAttention for 2 layers"):
        sdk.apply(model)


def test_probe_refuses_projections_that_are_no_query_groups() -> None:
    model = small_model("llama")
    model.model.layers[1].self_attn.k_proj = nn.Linear(32, 24)
    with pytest.raises(sdk.UnsupportedModelError, match="layer 1 projects to 32 query and 24 key features"):
        sdk.apply(model)


# A family of its own: other names for everything that the registry's data must supply.


class ToyConfig(LlamaConfig):
    model_type = "toy"


class ToyAttention(nn.Module):
    """Attention through transformers' interface, with projections that no built-in family names so."""

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal, self.scaling = True, config.head_dim**-0.5
        kv_size = config.num_key_value_heads * config.head_dim
        self.wq = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.wv = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.wo = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.wq, self.wk, self.wv)
        )
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.wo(out.flatten(2)), weights


class ToyDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn = ToyAttention(config, layer_idx)


class ToyModel(LlamaModel):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ToyDecoderLayer(config, i) for i in range(config.num_hidden_layers))


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = ToyModel(config)


TOY_FAMILY = f'''"""Toy, the family that the tests add."""

from thinkkv.patches.architecture import Architecture, Projections
from thinkkv.patches.registry import register

TOY = register(
    Architecture(
        model_type="toy",
        attention="ToyAttention",
        projections=Projections(q="wq", k="wk", v="wv", o="wo"),
        module="{__name__}",
    )
)
'''


@pytest.fixture
def toy_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One file in the package's folder, and its name in the registry's list."""
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    (tmp_path / "toy.py").write_text(TOY_FAMILY)
    monkeypatch.setattr(thinkkv.patches, "__path__", [*thinkkv.patches.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, "toy"))
    yield
    unregister("toy")
    del sys.modules["thinkkv.patches.toy"], thinkkv.patches.toy  # type: ignore[attr-defined]


def toy_model() -> ToyForCausalLM:
    torch.manual_seed(0)
    model = ToyForCausalLM(small_config("toy", num_hidden_layers=3)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # attention that looks somewhere
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.usefixtures("toy_family")
class TestToyFamily:
    """A family added by one file plus one line has everything the built-in ones have."""

    def test_it_is_listed(self) -> None:
        assert set(architectures()) == {*BUILT_IN, "toy"}

    def test_it_generates_the_same_tokens_at_full_budget(self) -> None:
        model, ids = toy_model(), torch.randint(1, 61, (1, 70))
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)
        with sdk.apply(model, policy="full") as handle:
            found = model.generate(ids, max_new_tokens=12, do_sample=False)
            assert handle.report().tokens_seen == 81
        assert found.tolist() == expected.tolist()

    def test_it_compresses(self) -> None:
        model, ids = toy_model(), torch.randint(1, 61, (1, 200))
        with sdk.apply(model, policy="snapkv", ratio=0.25) as handle:
            model.generate(ids, max_new_tokens=4, do_sample=False)
            found = handle.report().bytes
        assert 0 < found.used <= found.promised < 0.3 * found.full

    def test_a_model_patched_before_stays_patched_when_the_family_leaves(self) -> None:
        model, ids = toy_model(), torch.randint(1, 61, (1, 200))
        handle = sdk.apply(model, policy="snapkv", ratio=0.25)
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        entry = architectures()["toy"]
        unregister("toy")
        assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == expected.tolist()
        handle.revert()
        with pytest.raises(sdk.UnsupportedModelError, match="no patch for architecture 'toy'"):
            sdk.apply(model)
        register(entry)


def test_a_model_whose_attention_cannot_be_exchanged_is_refused_unpatched() -> None:
    # transformers reads the source of a model's module to find out, and only logs a warning where it cannot.
    # It remembers the answer on the class, where a subclass would inherit Llama's.
    unknown = {"__module__": "typed_at_a_prompt", "_can_set_attn_implementation_cached_value": None}
    frozen = type("FrozenForCausalLM", (LlamaForCausalLM,), unknown)
    model = frozen(small_config("llama")).eval()
    before = model.config._attn_implementation
    with pytest.raises(sdk.UnsupportedModelError, match="FrozenForCausalLM"):
        sdk.apply(model)
    assert model.config._attn_implementation == before
    assert "generate" not in model.__dict__
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)
