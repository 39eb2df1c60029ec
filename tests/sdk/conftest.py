"""A tokenizer with one token per character, for the tests that need text."""

from __future__ import annotations

import string
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = string.ascii_letters + string.digits + " \n:?.,'-"


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
