"""How a GGUF file's tokenizer reads text, where transformers leaves it open; llama.cpp is the measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PREFIX = "tokenizer.ggml."
DIGITS_APART = "smollm"
"""llama.cpp's name of the rule that splits off every digit before it splits as GPT-2 does."""

WHOLE_WORDS_FIRST = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}
)
"""llama.cpp's names of rules under which a word that is a token is not merged from pieces."""


def read_as_the_file_says(tokenizer: Any, path: Path) -> None:
    """Give a tokenizer the rules of the file that transformers built it from, in place.

    Args:
        tokenizer: a fast one.
        path: the GGUF file.
    """
    from gguf import GGUFReader  # part of the demo extra
    from tokenizers import normalizers, pre_tokenizers

    fields = GGUFReader(path).fields

    def stated(name: str, otherwise: Any) -> Any:
        field = fields.get(PREFIX + name)
        return otherwise if field is None else field.contents()

    backend, kind, rule = tokenizer.backend_tokenizer, stated("model", None), stated("pre", None)
    if kind == "gpt2" and rule == DIGITS_APART:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if kind == "gpt2" and rule in WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True
    if kind == "llama":
        prepend = [normalizers.Prepend("▁")] if stated("add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
