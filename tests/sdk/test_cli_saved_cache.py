"""``thinkkv generate --save-cache`` and ``--load-cache`` as a user meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.saved_files import rewrite
from tests.tiny_models import new_model
from thinkkv import sdk

TEXT = "the lamp of the harbour was lit by mira ost. " * 8
QUESTION = "who lit the lamp?"
TEMPLATE = (
    "{% for message in messages %}({{ message['role'] }}: {{ message['content'] }})\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant: {% endif %}"
)


@pytest.fixture(scope="module", params=["plain", "chat"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory, char_tokenizer: Any) -> Path:
    """A tiny random Qwen2 checkpoint with a tokenizer, without a chat template and with one."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-qwen2"
    new_model("qwen2", 2).save_pretrained(folder)
    char_tokenizer.save_pretrained(folder)
    if request.param == "chat":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def saved(thinkkv: Any, checkpoint: Path) -> Path:
    """The cache of the text, all of it kept."""
    done = thinkkv(
        "generate", "--model", checkpoint, "--policy", "full", "--prompt", TEXT, "--save-cache", "text.kv", "--json"
    )
    assert done.code == 0, done.err
    result = done.json
    assert result["policy"] == "full"
    assert result["file_bytes"] == Path("text.kv").stat().st_size > result["bytes"]["used"] == result["bytes"]["full"]
    assert set(result["seconds"]) == {"prefill", "save"}
    return Path("text.kv")


def has_template(checkpoint: Path) -> bool:
    return AutoTokenizer.from_pretrained(checkpoint).chat_template is not None


def test_it_answers_what_a_prompt_of_both_is_answered(thinkkv: Any, checkpoint: Path, saved: Path) -> None:
    """The stock way: the same prompt, read whole."""
    following = f"\n\n{QUESTION}" if has_template(checkpoint) else QUESTION
    whole = thinkkv(
        "generate",
        "--model",
        checkpoint,
        "--policy",
        "full",
        "--prompt",
        TEXT + following,
        "--max-new-tokens",
        12,
        "--json",
    ).json
    found = thinkkv("generate", "--load-cache", saved, "--prompt", QUESTION, "--max-new-tokens", 12, "--json").json
    assert {name: found[name] for name in ("text", "policy", "prompt_tokens", "new_tokens")} == {
        name: whole[name] for name in ("text", "policy", "prompt_tokens", "new_tokens")
    }
    assert found["bytes"]["used"] == whole["bytes"]["used"]
    assert set(found["seconds"]) == {"load", "prefill", "decode"}


def test_the_file_is_asked_again_and_brings_its_policy(thinkkv: Any, checkpoint: Path) -> None:
    done = thinkkv(
        "generate", "--model", checkpoint, "--policy", "snapkv", "--cache-dtype", "int8", "--ratio", 0.5,
        "--prompt", TEXT, "--save-cache", "text.kv",
    )  # fmt: skip
    assert done.code == 0
    assert done.out == ""
    assert "text.kv" in done.err
    first, again = (
        thinkkv("generate", "--load-cache", "text.kv", "--prompt", QUESTION, "--max-new-tokens", 8, "--json").json
        for _ in range(2)
    )
    assert first["policy"] == "snapkv"
    assert first["text"] == again["text"]
    assert first["bytes"] == again["bytes"]
    assert first["bytes"]["used"] <= first["bytes"]["promised"] < 0.6 * first["bytes"]["full"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--load-cache", "b", "--save-cache", "a"), "--load-cache"),
        (("--save-cache", "a", "--max-new-tokens", 3), "--max-new-tokens"),
        (("--save-cache", "a", "--compile"), "--compile"),
        (("--load-cache", "a", "--policy", "snapkv"), "--policy"),
        (("--load-cache", "a", "--ratio", 0.3, "--raw"), "--ratio, --raw"),
        (("--load-cache", "a", "--cache-dtype", "int8"), "--cache-dtype"),
    ],
)
def test_options_without_a_say_are_refused(
    thinkkv: Any, checkpoint: Path, more: tuple[object, ...], named: str
) -> None:
    done = thinkkv("generate", "--prompt", TEXT, *more)
    assert done.code == 2
    assert named in done.error


def test_what_is_no_saved_text_is_one_line(thinkkv: Any, checkpoint: Path, saved: Path) -> None:
    done = thinkkv("generate", "--load-cache", "other.kv", "--prompt", QUESTION)
    assert done.code == 1
    assert "no file other.kv" in done.error
    saved.write_bytes(saved.read_bytes()[:-9])
    done = thinkkv("generate", "--load-cache", saved, "--prompt", QUESTION)
    assert done.code == 1
    assert "damaged" in done.error


def test_a_cache_of_a_program_has_no_text(thinkkv: Any, checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer = sdk.load(checkpoint)
    with sdk.apply(model) as handle:
        cache = handle.new_cache()
        model(**tokenizer(TEXT, return_tensors="pt"), past_key_values=cache)
        path = handle.save_cache(tmp_path / "program.kv", cache)
    done = thinkkv("generate", "--model", checkpoint, "--load-cache", path, "--prompt", QUESTION)
    assert done.code == 1
    assert "--save-cache" in done.error


def test_a_question_that_does_not_follow_the_text_is_refused(thinkkv: Any, checkpoint: Path, saved: Path) -> None:
    def other_ids(header: dict[str, Any]) -> dict[str, Any]:
        header["about"]["ids"][3] += 1  # as another version of the tokenizer might have it
        return header

    rewrite(saved, other_ids)
    done = thinkkv("generate", "--load-cache", saved, "--prompt", QUESTION)
    assert done.code == 1
    assert "begin the question with a word" in done.error


def test_text_and_question_beyond_the_context_are_refused(thinkkv: Any, checkpoint: Path, saved: Path) -> None:
    done = thinkkv("generate", "--load-cache", saved, "--prompt", QUESTION, "--max-new-tokens", 4000)
    assert done.code == 1
    assert "context of 2048" in done.error
    done = thinkkv("generate", "--model", checkpoint, "--prompt", TEXT * 8, "--save-cache", "long.kv")
    assert done.code == 1
    assert "context of 2048" in done.error
    assert not Path("long.kv").exists()


def test_an_unwritable_place_is_named_before_anything_is_read(
    thinkkv: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinkkv.sdk.models.load", lambda *args, **options: pytest.fail("the model was loaded"))
    done = thinkkv("generate", "--model", checkpoint, "--prompt", TEXT, "--save-cache", "no/folder/text.kv")
    assert done.code == 1
    assert "no/folder/text.kv" in done.error
