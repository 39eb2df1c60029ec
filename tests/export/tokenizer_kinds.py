"""Kinds of tokenizers that models have, small ones of each, and strings on which their rules differ."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from thinkkv.sdk.hidden_facts import builtin_prompts

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END, USER, TOOL = "<s>", "</s>", "<|user|>", "<tool>"
CHAT = "{{ '" + BEGIN + USER + "' }}{{ messages[0]['content'] }}{{ '" + END + "' }}"

STRINGS = (
    "",
    "a",
    "Hello world, this is the plan.",
    "1234567 and 12 345 678, 3.14159; 2024-10-31, x1y22z333",
    "it's don't you'll WE'RE HE'S I'M they'D we'Ve 'Tis rock'n'roll",
    "  two   three    spaces  ",
    "\n\n\nlines\n\n  \n\tand\t\ttabs\r\n    return x\r\n\r\n",
    "Ça déjà été à l'école, Größe, naïve, mañana, İstanbul, straße",
    "!!!\n\n?/\n//  --x {'a': [1, 2]} a//b/\nc",
    "北京大学2024年 東京タワー 한국어 привет мир Ελλάδα שלום العربية ٣٤",
    "हिन्दी में नमस्ते ภาษาไทย e\u0301 a\u0308 éBa NAÏve",
    "🙂👍🏽👨‍👩‍👧 ok ½²№Ⅷ ﬁ Å",
    "\x00\x01\x7f\x85\u00a0\u200b\u2028\u3000\ufeff\U0010fffd",
    f"{BEGIN}hi{USER} there {TOOL}x{TOOL} \n{END}{USER}",
)
LATIN = 9
"""The first so many of the strings."""

PIECES = (
    *"abTzZ'sSdDmMlLvVrReE  \n\r\t019.,!?/-_éÉßक्िあ北🙂\u0301½٣\u00a0\u3000\x00",
    "the",
    " and",
    "'ll",
    "  ",
    "123",
    TOOL,
)


def identity(text: str) -> str:
    """All text is read alike."""
    return text


def composed(text: str) -> str:
    """llama.cpp does not compose characters, Qwen2's tokenizer does."""
    return unicodedata.normalize("NFC", text)


def uncased_or_ascii(text: str) -> str:
    """llama.cpp takes tekken's case from ASCII and knows no combining marks."""
    return "".join(c for c in text if c.isascii() or not unicodedata.category(c).startswith(("Lu", "Ll", "M")))


def without_leading_space(text: str) -> str:
    """Metaspace takes a space at the beginning for its own, llama.cpp puts another before it."""
    for token in (BEGIN, END, USER, TOOL):
        text = text.replace(token, "")
    return text.lstrip(" ")


@dataclass(frozen=True)
class Case:
    """A kind of tokenizer, and which texts llama.cpp can read as it does."""

    name: str
    build: Callable[[], Any]
    readable: Callable[[str], str] = field(default=identity)

    def __str__(self) -> str:
        return self.name


def corpus() -> list[str]:
    """Some hundred words, and strings from above often enough for merges across all boundaries; no rarer scripts."""
    return [*builtin_prompts()[:3], *(20 * [" ".join(STRINGS[2:LATIN])])]


def framed(tokenizer: Tokenizer, begin: bool) -> Any:
    """As transformers has it; perhaps with a begin before every text."""
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


@cache
def byte_level_vocabulary() -> str:
    """Merges cross digits, apostrophes and spaces: wherever a tokenizer splits shows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[BEGIN, END, USER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(TOOL, special=False, normalized=False)])
    return tokenizer.to_str()


def splitting(regex: str) -> Any:
    """By a regex of its own, then to bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2])


def byte_level(
    pre_tokenizer: Any, *, normalizer: Any = None, ignore_merges: bool = False, begin: bool = False
) -> Callable[[], Any]:
    """Same vocabulary, other rules. One token of it no merge gives: ``ignore_merges`` alone finds it."""

    def build() -> Any:
        content = json.loads(byte_level_vocabulary())
        words = [pair for pair in content["model"]["merges"] if pair[0] + pair[1] == "Ġthe"]
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pair not in words]
        assert words
        content["model"]["ignore_merges"] = ignore_merges
        tokenizer = Tokenizer.from_str(json.dumps(content))
        tokenizer.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        return framed(tokenizer, begin)

    return build


@cache
def sentencepiece_vocabulary() -> str:
    """Pieces, all pairs that make one as merges, and ids in another order than the merges'."""
    fixed = ["<unk>", BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256)), USER]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁]+|▁+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=fixed, initial_alphabet=["▁", "\n"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    pieces = sorted(model["vocab"].keys() - set(fixed), key=lambda piece: piece[::-1])
    ranked = [left + right for left, right in model["merges"]]
    model["merges"] = [
        [piece[:cut], piece[cut:]]
        for piece in dict.fromkeys(ranked)
        for cut in range(1, len(piece))
        if piece[:cut] in model["vocab"] and piece[cut:] in model["vocab"]
    ]
    model["vocab"] = {piece: i for i, piece in enumerate([*fixed, *pieces])}
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    content["normalizer"] = content["pre_tokenizer"] = None
    return json.dumps(content)


def sentencepiece(*, normalizer: Any = None, metaspace: str | None = None, template: str | None = None) -> Any:
    """With a rule for the space before text."""

    def build() -> Any:
        tokenizer = Tokenizer.from_str(sentencepiece_vocabulary())
        tokenizer.add_tokens([AddedToken(TOOL, special=False, normalized=False)])
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if metaspace is not None:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        wrapped = framed(tokenizer, begin=True)
        wrapped.chat_template = template
        return wrapped

    return build


SPACES = normalizers.Replace(" ", "▁")
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), SPACES])

CASES = (
    Case("llama-3", byte_level(splitting(LLAMA_3), ignore_merges=True, begin=True)),
    Case("llama-3-follows-merges", byte_level(splitting(LLAMA_3))),
    Case("qwen2", byte_level(splitting(QWEN_2), normalizer=normalizers.NFC()), composed),
    Case("deepseek-r1-distill-qwen", byte_level(splitting(QWEN_2), normalizer=normalizers.NFC(), begin=True), composed),
    Case("smollm", byte_level(DIGITS)),
    Case("gpt-2", byte_level(GPT_2)),
    Case("tekken", byte_level(splitting(TEKKEN), ignore_merges=True, begin=True), uncased_or_ascii),
    Case("sentencepiece-prepend", sentencepiece(normalizer=PREPEND)),
    Case("sentencepiece-replace", sentencepiece(normalizer=SPACES)),
    Case("sentencepiece-never", sentencepiece(metaspace="never")),
    Case("sentencepiece-always", sentencepiece(metaspace="always"), without_leading_space),
    Case("sentencepiece-first", sentencepiece(metaspace="first"), without_leading_space),
)
