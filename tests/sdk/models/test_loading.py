"""What loads, how it is kept, and that it can be saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from tests.sdk.models.tiny_checkpoints import (
    TEXT,
    logits,
)
from thinkkv import sdk
from thinkkv.sdk.model_sources import ALIASES, packaged_file


def test_a_folder_loads_as_it_is(checkpoint: Path) -> None:
    model, tokenizer = sdk.load(checkpoint)
    stock = Qwen2ForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert torch.equal(logits(model, tokenizer), logits(stock.eval(), tokenizer))
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


@pytest.mark.parametrize("dtype", ["float32", torch.float16], ids=str)
def test_a_dtype_can_be_asked_for(checkpoint: Path, dtype: str | torch.dtype) -> None:
    model, _ = sdk.load(str(checkpoint), dtype=dtype, device="cpu")
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def test_an_unknown_dtype_is_refused(checkpoint: Path) -> None:
    with pytest.raises(sdk.ThinkKVError, match="no dtype 'int3' - choose one of float32, bfloat16, float16"):
        sdk.load(checkpoint, dtype="int3")


def test_a_gguf_file_loads_and_can_be_saved_again(
    pristine_gguf: Path, gguf_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model, tokenizer = sdk.load(pristine_gguf)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model, tokenizer), logits(gguf_model, tokenizer))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, again_tokenizer = sdk.load(tmp_path / "saved")
    assert again_tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert torch.equal(logits(again, again_tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("dtype", [None, "bfloat16"], ids=str)
def test_a_kept_conversion_gives_what_the_file_gave(
    pristine_gguf: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinkkv.sdk.models.KEEP_CONVERTED_BELOW", 0)
    first = sdk.load(pristine_gguf, dtype=dtype)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(pristine_gguf.parent / f"cache-{dtype}"))
    sdk.load(pristine_gguf, dtype=dtype)
    monkeypatch.setattr("thinkkv.sdk.models._dequantize", None)  # so that converting again would fail
    kept = sdk.load(pristine_gguf, dtype=dtype)
    assert torch.equal(logits(*first), logits(*kept))
    assert first[1](TEXT).input_ids == kept[1](TEXT).input_ids


def test_a_damaged_conversion_is_made_again(pristine_gguf: Path, tmp_path: Path) -> None:
    expected = logits(*sdk.load(pristine_gguf))
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    kept.write_bytes(b"damaged")
    assert torch.equal(logits(*sdk.load(pristine_gguf)), expected)


def test_a_cache_that_cannot_be_written_does_not_matter(pristine_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert sdk.load(pristine_gguf)[0].dtype == torch.float32


@pytest.mark.slow
def test_the_demo_model_loads_and_can_be_saved_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if packaged_file(ALIASES["smollm2-135m"]) is None:
        pytest.skip("the demo extra is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME")  # the user's: converting takes long, and this conversion is worth keeping
    model, tokenizer = sdk.load("smollm2-135m")
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
    assert tokenizer.chat_template
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(*sdk.load(tmp_path / "saved")), logits(model, tokenizer))
