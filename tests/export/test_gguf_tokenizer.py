"""Stock llama.cpp reads strings as the tokens that the Hugging Face tokenizer makes of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from tests.export.baking import SMALL, profile_of
from tests.export.tokenizer_kinds import (
    BEGIN,
    CASES,
    CHAT,
    END,
    PIECES,
    QWEN_2,
    STRINGS,
    USER,
    Case,
    byte_level,
    composed,
    sentencepiece,
    splitting,
)
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
