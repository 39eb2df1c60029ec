"""Stock llama.cpp reads strings as the tokens that the Hugging Face tokenizer makes of them."""

from __future__ import annotations

import copy
import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.export.baking import SMALL, profile_of
from tests.tiny_models import new_model
from thinkkv import sdk
from thinkkv.export.bake import Baked, bake
from thinkkv.export.export import export
from thinkkv.export.gguf import write_gguf
from thinkkv.export.llama_cpp import LlamaCpp
from thinkkv.export.verification import verify_gguf
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.hidden_facts import builtin_prompts
from thinkkv.sdk.policies import Full

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


def baked(tokenizer: Any) -> Baked:
    """A tiny model with room for the tokenizer."""
    model = new_model("llama", 4)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.nn.init.zeros_(model.lm_head.weight.data[tokenizer.eos_token_id])  # never the most probable token
    return bake(model, tokenizer, policy=SMALL, budget=Budget(ratio=0.6), profile=profile_of(model), context=128)


@pytest.fixture(scope="module", params=CASES, ids=str)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Path]:
    """A kind, its tokenizer and the exported file."""
    case: Case = request.param
    tokenizer, path = case.build(), tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(baked(tokenizer), path)
    return case, tokenizer, path


@pytest.fixture(scope="module")
def reading(written: tuple[Case, Any, Path]) -> tuple[Case, Any, LlamaCpp]:
    """The file in llama.cpp."""
    case, tokenizer, path = written
    return case, tokenizer, LlamaCpp(path, context=128)


def test_strings_become_the_tokenizers_tokens(reading: tuple[Case, Any, LlamaCpp]) -> None:
    case, tokenizer, runtime = reading
    for text in map(case.readable, STRINGS):
        assert runtime.tokens(text) == tokenizer(text).input_ids, text


@settings(max_examples=150)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_string_becomes_the_tokenizers_tokens(reading: tuple[Case, Any, LlamaCpp], pieces: list[str]) -> None:
    case, tokenizer, runtime = reading
    text = case.readable("".join(pieces))
    assert runtime.tokens(text) == tokenizer(text).input_ids


def test_the_file_loads_again_with_the_same_tokens_and_text(
    written: tuple[Case, Any, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, tokenizer, path = written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    converted, kept = sdk.load(path)[1], sdk.load(path)[1]
    for text in map(case.readable, STRINGS):
        ids = tokenizer(text).input_ids
        for again in (converted, kept):
            assert again(text).input_ids == ids, text
            assert again.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True), text


def test_splitting_rules_differ_on_the_strings() -> None:
    """Otherwise a wrong name would go unnoticed above."""
    tokenizers = [case.build() for case in CASES if not case.name.startswith("sentencepiece")]
    read = [tuple(tuple(each(composed(text)).input_ids) for text in STRINGS) for each in tokenizers]
    assert len(set(read)) == len(tokenizers)


def test_composing_is_left_to_the_caller_where_the_tokenizer_composes(tmp_path: Path) -> None:
    tokenizer = byte_level(splitting(QWEN_2), normalizer=normalizers.NFC())()
    write_gguf(baked(tokenizer), tmp_path / "model.gguf")
    runtime, text = LlamaCpp(tmp_path / "model.gguf", context=128), "cafe\u0301"
    assert runtime.tokens(composed(text)) == tokenizer(text).input_ids != runtime.tokens(text)


def test_a_chat_is_read_as_metaspaces_first_has_it(tmp_path: Path) -> None:
    """The space comes before the very first text only, and a chat begins with a special token."""
    tokenizer = sentencepiece(metaspace="first", template=CHAT)()
    write_gguf(baked(tokenizer), tmp_path / "model.gguf")
    runtime = LlamaCpp(tmp_path / "model.gguf", context=128)
    for text in STRINGS:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        assert runtime.tokens(chat) == tokenizer(chat).input_ids, text


def edited(case: int, change: Callable[[dict[str, Any]], object]) -> Any:
    """A tokenizer of the list with another ``tokenizer.json``."""
    tokenizer = CASES[case].build()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token=BEGIN, eos_token=END, pad_token=END
    )


def set_added(name: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        content["added_tokens"][-1][name] = True

    return change


def interleave(content: dict[str, Any]) -> None:
    """The pairs of one piece no longer stand together."""
    merges = content["model"]["merges"]
    results = ["".join(pair) for pair in merges]
    first = next(i for i in range(len(merges) - 2) if results[i] == results[i + 1] != results[i + 2])
    merges[first + 1], merges[first + 2] = merges[first + 2], merges[first + 1]


LLAMA, QWEN, SMOLLM, GPT, SPM, METASPACE = 0, 2, 4, 5, 7, 9
REFUSED: dict[str, tuple[int, Callable[[dict[str, Any]], object], str]] = {
    "another regex": (
        QWEN,
        lambda content: content["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{N}{1,2}|\D+"),
        r"no name for how the tokenizer splits text .*\{1,2\}",
    ),
    "digits in groups": (
        SMOLLM,
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False),
        "no name for how the tokenizer splits text",
    ),
    "space before text": (
        GPT,
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        "no name for how",
    ),
    "no bytes": (GPT, lambda content: content.update(pre_tokenizer={"type": "Whitespace"}), "no name for how"),
    "whole words": (GPT, lambda content: content["model"].update(ignore_merges=True), "ignore_merges true"),
    "lower case": (GPT, lambda content: content.update(normalizer={"type": "Lowercase"}), "change text .*Lowercase"),
    "end of word": (GPT, lambda content: content["model"].update(end_of_word_suffix="</w>"), "end of words"),
    "strips spaces": (GPT, set_added("rstrip"), "strips no spaces beside it"),
    "single word": (GPT, set_added("single_word"), "finds the token '<tool>' wherever it stands"),
    "token after a space": (SPM, set_added("normalized"), "finds the token '<tool>' wherever it stands"),
    "words": (METASPACE, lambda content: content["pre_tokenizer"].update(split=True), "cannot treat spaces"),
    "compatibility": (SPM, lambda content: content.update(normalizer={"type": "NFKC"}), "cannot treat spaces .*NFKC"),
    "a byte less": (SPM, lambda content: content["model"]["vocab"].pop("<0x41>"), "all 256 bytes"),
    "a merge less": (SPM, lambda content: content["model"]["merges"].pop(), "merges by scores"),
    "same text to a C reader": (
        SPM,
        lambda content: content["added_tokens"][-1].update(content=USER + "\0"),
        "a text of its own",
    ),
    "merges interleaved": (SPM, interleave, "merges by scores"),
    "another frame": (
        GPT,
        lambda content: content.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": USER, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {USER: {"id": USER, "ids": [2], "tokens": [USER]}},
            }
        ),
        r"makes '<\|user\|>a' of 'a'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_llama_cpp_cannot_say_is_refused(kind: str, tmp_path: Path) -> None:
    case, change, said = REFUSED[kind]
    with pytest.raises(ExportError, match=said):
        write_gguf(baked(edited(case, change)), tmp_path / "model.gguf")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = CASES[GPT].build()
    done = baked(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ExportError, match="names no end of text"):
        write_gguf(done, tmp_path / "model.gguf")


@pytest.mark.parametrize("case", [CASES[LLAMA], CASES[QWEN], CASES[SPM]], ids=str)
def test_an_export_is_verified_by_text(case: Case, tmp_path: Path) -> None:
    done = export(baked(case.build()), tmp_path / "out", format="gguf")
    assert done.verified.greedy_tokens_equal is True


@pytest.mark.parametrize("other", [LLAMA, SMOLLM, GPT], ids=lambda index: CASES[index].name)
def test_a_file_that_splits_text_otherwise_is_found(other: int, tmp_path: Path) -> None:
    done = baked(CASES[QWEN].build())
    write_gguf(done, tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="reads text as other tokens than the tokenizer does"):
        verify_gguf(replace(done, tokenizer=CASES[other].build()), tmp_path / "model.gguf")


def test_a_chat_that_no_space_rule_fits_is_found(tmp_path: Path) -> None:
    """It begins with text and goes on with text after a special token; Metaspace's ``first`` tells them apart."""
    template = "{{ 'hi' }}" + CHAT
    done = baked(sentencepiece(metaspace="first", template=template)())
    with pytest.raises(ExportError, match="reads text as other tokens than the tokenizer does"):
        export(done, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def real(smollm2: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Baked, LlamaCpp]:
    """SmolLM2-135M with the weights of its file, and the file in llama.cpp."""
    model, path = copy.deepcopy(smollm2[0]), tmp_path_factory.mktemp("real") / "model.gguf"
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    done = bake(model, smollm2[1], policy=Full(), budget=Budget(ratio=1.0))
    write_gguf(done, path)
    return done, LlamaCpp(path, context=512)


@pytest.mark.slow
def test_a_real_tokenizer_reads_alike(real: tuple[Baked, LlamaCpp]) -> None:
    done, runtime = real
    for text in [*STRINGS, *builtin_prompts()]:
        assert runtime.tokens(text) == done.tokenizer(text).input_ids, text


@pytest.mark.slow
@pytest.mark.parametrize("question", ["Why is the sky blue?", "Ajoute 1234567 et 89,\n\ns'il te plaît! 🙂"])
def test_a_rendered_chat_gets_the_dense_models_answer(real: tuple[Baked, LlamaCpp], question: str) -> None:
    done, runtime = real
    chat = done.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = done.tokenizer(chat, return_tensors="pt").input_ids
    out = done.model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert runtime.text(chat, 40) == done.tokenizer.decode(out, skip_special_tokens=True)
