"""What most tests of the SDK start from: a tiny model, a prompt, and a tokenizer with one token per character."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import new_model, prompts

CHARACTERS = string.ascii_letters + string.digits + " \n:?.,'-"


@pytest.fixture
def model() -> Any:
    return new_model("llama", 2)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return prompts([90]).ids


@pytest.fixture(scope="session")
def char_tokenizer() -> Any:
    """Small enough for the vocabulary of the tiny models; other characters become ``<unk>``."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )
