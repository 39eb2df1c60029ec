"""A text that is read once and asked about later, from a file: the jobs of ``thinkkv generate --save-cache`` and back.

What is compressed is the beginning of the prompt, up to where a question would come. A chat template puts something
behind that, too; so the beginning is what the prompts of two questions have in common.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from thinkkv.patches.errors import SavedCacheError
from thinkkv.sdk.generate_text import Generated, answer, check_context, encode
from thinkkv.sdk.patching import apply
from thinkkv.sdk.report import Bytes, report
from thinkkv.sdk.saved_cache import about_cache, check_place


@dataclass(frozen=True)
class SavedText:
    """What stands in the file beside the cache.

    Args:
        model: its name, by which ``sdk.load`` finds it.
        dtype: it was loaded in.
        text: that was read.
        chat: whether questions come in the tokenizer's chat template.
        ids: token ids that the cache has seen.
    """

    model: str
    dtype: str
    text: str
    chat: bool
    ids: list[int]

    @classmethod
    def of(cls, path: Path) -> SavedText:
        """From the file, without the cache.

        Raises:
            SavedCacheError: there is none, or it is damaged, or a program saved it without a text.
        """
        about = about_cache(path)
        if about.keys() != {field.name for field in fields(cls)}:
            raise SavedCacheError(
                f"{path} was not saved by `thinkkv generate --save-cache` - load it where it was saved"
            )
        return cls(**about)

    def asked(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of text and question.

        Raises:
            SavedCacheError: these do not begin with those that were read.
        """
        ids = _asked(tokenizer, self.text, question, self.chat)
        if ids[: len(self.ids)] != self.ids:
            raise SavedCacheError(
                "the tokenizer joins the question to the text before it, or is not the one that read the text - "
                "begin the question with a word"
            )
        return ids


@dataclass(frozen=True)
class Read:
    """A text that was read.

    Args:
        policy: what the cache kept by.
        prompt_tokens: of the text.
        prefill_seconds: until it was read and compressed.
        save_seconds: until the file was written.
        bytes: of the cache.
        file_bytes: of the file.
    """

    policy: str
    prompt_tokens: int
    prefill_seconds: float
    save_seconds: float
    bytes: Bytes
    file_bytes: int

    def as_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {
            "policy": self.policy,
            "prompt_tokens": self.prompt_tokens,
            "seconds": {"prefill": round(self.prefill_seconds, 4), "save": round(self.save_seconds, 4)},
            "bytes": vars(self.bytes),
            "file_bytes": self.file_bytes,
        }


def read_text(model: Any, tokenizer: Any, text: str, path: Path, *, name: str, chat: bool = True, **patch: Any) -> Read:
    """Read a text, and write its compressed cache to a file.

    Args:
        model, tokenizer: from ``sdk.load``.
        text: as the beginning of a user message where ``chat`` is set and the tokenizer has a template.
        path: of the file.
        name: of the model, by which ``sdk.load`` finds it again.
        chat: whether questions come in the tokenizer's chat template.
        patch: as for ``apply``.

    Raises:
        ThinkKVError: the text has no tokens, or does not fit the model's context.
        SavedCacheError: the file cannot be written.
    """
    check_place(path)
    ids = _beginning(tokenizer, text, chat)
    check_context(model, len(ids), 1)
    inputs = torch.tensor([ids], device=model.device)
    with apply(model, **patch) as handle:
        cache = handle.new_cache()
        start = time.perf_counter()
        with torch.inference_mode():
            model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        done = time.perf_counter()
        saved = SavedText(name, str(model.dtype).removeprefix("torch."), text, chat, ids)
        handle.save_cache(path, cache, vars(saved))
        held = report(cache)
        return Read(
            policy=held.policy,
            prompt_tokens=len(ids),
            prefill_seconds=done - start,
            save_seconds=time.perf_counter() - done,
            bytes=held.bytes,
            file_bytes=path.stat().st_size,
        )


def ask(
    model: Any,
    tokenizer: Any,
    question: str,
    path: Path,
    *,
    compiled: bool = False,
    max_new_tokens: int = 200,
    temperature: float | None = None,
    echo: Callable[[str], None] | None = None,
) -> Generated:
    """Answer a question about a text that ``read_text`` has saved.

    Args:
        model, tokenizer: those that read it.
        question: follows the text.
        path: of the file.
        compiled, max_new_tokens, temperature, echo: as for ``generate_text``.

    Raises:
        ThinkKVError: the question does not fit the model's context, or does not follow the text token by token.
        SavedCacheError: the file is not what ``read_text`` wrote, or of another model.
    """
    ids = SavedText.of(path).asked(tokenizer, question)
    check_context(model, len(ids), max_new_tokens)
    with apply(model, policy="full", compiled=compiled) as handle:
        start = time.perf_counter()
        cache = handle.load_cache(path)
        loaded = time.perf_counter() - start
        done = answer(
            model, tokenizer, ids, cache, compiled=compiled, max_new_tokens=max_new_tokens, temperature=temperature,
            echo=echo,
        )  # fmt: skip
    return replace(done, load_seconds=loaded)


def _asked(tokenizer: Any, text: str, question: str, chat: bool) -> list[int]:
    """Token ids of text and question."""
    if chat and getattr(tokenizer, "chat_template", None):
        return encode(tokenizer, f"{text}\n\n{question}", chat=True)
    following: list[int] = tokenizer(question, add_special_tokens=False).input_ids
    return encode(tokenizer, text, chat=False) + following


def _beginning(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Token ids of the text, whatever question follows."""
    first, second = (_asked(tokenizer, text, question, chat) for question in ("A", "What"))
    return [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))]
