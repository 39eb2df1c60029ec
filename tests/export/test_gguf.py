"""Stock llama.cpp continues a GGUF export as the dense PyTorch model does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.export.baking import SMALL, dense_logits, profile_of
from tests.tiny_models import VOCABULARY, new_model, prompts
from thinkkv.export.bake import Baked, bake
from thinkkv.export.gguf import write_gguf
from thinkkv.export.llama_cpp import LlamaCpp
from thinkkv.export.verification import NEW, verify_gguf
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.budget import Budget

FAMILIES = ("llama", "llama3", "mistral", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level tokenizer of as many letters as the tiny models have room for; llama.cpp wants a merge, too."""
    alphabet = ["Ċ", "Ġ", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(["<|end|>", "ab", *alphabet[: VOCABULARY - 2]])}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level, eos_token="<|end|>", pad_token="<|end|>", chat_template="{{ messages }}"
    )


def baked(family: str, tokenizer: Any) -> Baked:
    model = new_model(family, 4)
    if family == "qwen2":  # llama.cpp wants heads that fill the hidden size here, as all real Qwen2 have them
        config = copy.deepcopy(model.config)
        config.hidden_size = config.num_attention_heads * config.head_dim
        model = type(model)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    torch.nn.init.zeros_(model.lm_head.weight.data[0])  # the end is never the most probable token
    return bake(model, tokenizer, policy=SMALL, budget=Budget(ratio=0.6), profile=profile_of(model), context=128)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_generates_the_dense_models_text(family: str, tokenizer: Any, tmp_path: Path) -> None:
    done = baked(family, tokenizer)
    # float16 rounds the weights: the yardstick must have the same ones.
    for parameter in done.model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    write_gguf(done, tmp_path / "model.gguf")
    runtime = LlamaCpp(tmp_path / "model.gguf", context=256)
    ids = prompts((90,)).ids
    choices = clear_choices(done.model, ids, 24)
    assert len(choices) >= 12
    for before, token in choices:
        assert runtime.text(before, 1) == tokenizer.decode(token)


def clear_choices(model: Any, ids: torch.Tensor, new: int) -> list[tuple[list[int], int]]:
    """What greedy decoding chooses after what; without close calls, as llama.cpp rounds activations to float16."""
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None)
    logits = dense_logits(model, out)[0, ids.shape[1] - 1 : -1]
    best = logits.topk(2, dim=-1).values
    clear = ((best[:, 0] - best[:, 1]) > 0.05 * logits.std()).nonzero()[:, 0].tolist()
    tokens = out[0].tolist()
    return [(tokens[: ids.shape[1] + i], tokens[ids.shape[1] + i]) for i in clear]


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_files_load(quantize: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_gguf(baked("llama", tokenizer), tmp_path / "model.gguf", quantize=quantize)
    wanted = {"int8": gguf.GGMLQuantizationType.Q8_0, "int4": gguf.GGMLQuantizationType.Q4_0}[quantize]
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == wanted
    assert LlamaCpp(tmp_path / "model.gguf", context=128).text([5, 6, 7], 8)


def test_classes_and_template_are_in_the_file(tokenizer: Any, tmp_path: Path) -> None:
    done = baked("qwen3", tokenizer)
    write_gguf(done, tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert json.loads(fields["thinkkv.heterogeneous"].contents()) == done.block.heterogeneous
    assert json.loads(fields["thinkkv.policy"].contents())["name"] == "task-kv"
    assert json.loads(fields["thinkkv.budget"].contents())["ratio"] == 0.6
    assert fields["thinkkv.version"].contents() == done.block.version
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"


def test_sliding_windows_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="sliding windows"):
        write_gguf(baked("mistral-window", tokenizer), tmp_path / "model.gguf")


def coarse_in_float16(done: Baked) -> None:
    """Large times small: the product stays, the small factor is so small that float16 keeps few of its digits."""
    with torch.no_grad():
        for layer in done.model.model.layers:
            layer.mlp.up_proj.weight.mul_(2e-6)
            layer.mlp.gate_proj.weight.mul_(1e4)
            layer.mlp.down_proj.weight.mul_(50.0)


def test_a_file_is_verified_against_the_weights_that_it_has(tokenizer: Any, tmp_path: Path) -> None:
    done = baked("llama", tokenizer)
    coarse_in_float16(done)
    write_gguf(done, tmp_path / "model.gguf")
    verified = verify_gguf(done, tmp_path / "model.gguf")
    assert verified.greedy_tokens_equal is True
    assert verified.compared > NEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verifying_leaves_the_model_as_it_was(dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    done = baked("llama", tokenizer)
    for parameter in done.model.parameters():
        parameter.data = parameter.data.to(dtype)
    before = copy.deepcopy(done.model.state_dict())
    write_gguf(done, tmp_path / "model.gguf")
    assert verify_gguf(done, tmp_path / "model.gguf").greedy_tokens_equal is True
    for name, tensor in done.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("step", "equal"), [(1, True), (2, False)], ids=["the twin", "another"])
def test_only_a_close_call_may_fall_otherwise(
    step: int, equal: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = baked("llama", tokenizer)
    with torch.no_grad():
        done.model.lm_head.weight[2::2] = done.model.lm_head.weight[1:-1:2]  # 1 and 2 are as probable, 3 and 4, ...
    write_gguf(done, tmp_path / "model.gguf")
    real = LlamaCpp.greedy_tokens
    # Equal logits: both choose the first of the twins, and here llama.cpp chooses what follows it.
    monkeypatch.setattr(
        LlamaCpp,
        "greedy_tokens",
        lambda self, *rest: [token + step for token in real(self, *rest) if token + step < 97],
    )
    assert verify_gguf(done, tmp_path / "model.gguf").greedy_tokens_equal is equal


def test_another_models_file_is_found(tokenizer: Any, tmp_path: Path) -> None:
    done = baked("llama", tokenizer)
    write_gguf(done, tmp_path / "model.gguf")
    with torch.no_grad():
        done.model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    assert verify_gguf(done, tmp_path / "model.gguf").greedy_tokens_equal is False
