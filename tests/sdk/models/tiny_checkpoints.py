"""What the checkpoints of these tests are made of."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "a quick brown fox"
VOCABULARY = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "qu", "ro"]
MERGES = [("q", "u"), ("r", "o")]
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(VOCABULARY)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokenizer(TEXT, return_tensors="pt").input_ids).logits


def gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    base, _, kind = name.rpartition(".")
    return f"{names.get_name(base)}.{kind}"


def gguf_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Query and key rows in GGUF's order, the halves of each head interleaved."""
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    found = next((count for part, count in heads.items() if part in name), None)
    if found is None:
        return tensor
    return tensor.view(found, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
