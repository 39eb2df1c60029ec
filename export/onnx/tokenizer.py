"""A bundle's tokenizer and chat template without transformers, which imports PyTorch wherever that is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import BundleError, ExportError
from thinkkv.sdk.extras import require


class BundleTokenizer:
    """Text to token ids and back.

    Args:
        folder: with ``tokenizer.json``, ``tokenizer_config.json`` and perhaps ``chat_template.jinja``.
    """

    def __init__(self, folder: Path) -> None:
        require(("tokenizers",), extra="export", purpose="running a bundle")
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise BundleError(f"the tokenizer of {folder} cannot be read ({error}) - export again") from error
        template = folder / "chat_template.jinja"
        self._template = (
            template.read_text(encoding="utf-8") if template.is_file() else self._config.get("chat_template")
        )

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, as a user message where ``chat`` is set and there is a template.

        Raises:
            ExportError: it has none.
        """
        wrapped = chat and self._template
        text = self._as_message(prompt) if wrapped else prompt
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not wrapped).ids
        if not ids:
            raise ExportError("the prompt has no tokens - give it some text")
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _as_message(self, prompt: str) -> str:
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template comes with the model: no access to Python

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        special = {name: self._special(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        messages = [{"role": "user", "content": prompt}]
        return environment.from_string(self._template).render(
            messages=messages, add_generation_prompt=True, **{name: token for name, token in special.items() if token}
        )

    def _special(self, name: str) -> str | None:
        token: Any = self._config.get(name)
        return token["content"] if isinstance(token, dict) else token


def _refuse(message: str) -> None:
    raise ExportError(f"the chat template refuses the prompt ({message}) - feed it as it is with --raw")
