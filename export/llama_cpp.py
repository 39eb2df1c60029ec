"""Tokens and greedy text of a GGUF file in stock llama.cpp, through the prebuilt package xllamacpp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from thinkkv.patches.errors import ExportError, MissingExtraError


def installed() -> bool:
    """Whether llama.cpp is there."""
    return find_spec("xllamacpp") is not None


class LlamaCpp:
    """A loaded GGUF file.

    Args:
        path: the file.
        context: tokens that prompt and text may take together.
        threads: of llama.cpp.
        cache: type of keys and values; llama.cpp's default is f16.
    """

    def __init__(self, path: Path, *, context: int, threads: int = 1, cache: Literal["f32", "f16"] = "f32") -> None:
        if not installed():
            raise MissingExtraError("running a GGUF file needs xllamacpp - pip install xllamacpp")
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx = context
        options.n_parallel = 1
        options.warmup = False
        options.verbosity = -1
        options.cache_type_k = options.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache.upper()}")
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        try:
            self._server = xllamacpp.Server(options)
        except Exception as error:
            raise ExportError(f"llama.cpp cannot load {path} ({error}) - export again") from error

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens in it and what the file adds around it."""
        connection = HTTPConnection(self._server.listening_address.removeprefix("http://"))
        request = json.dumps({"content": text, "add_special": True, "parse_special": True})
        connection.request("POST", "/tokenize", request, {"Content-Type": "application/json"})
        with closing(connection), connection.getresponse() as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids

    def complete(
        self, prompt: str | Sequence[int], new: int, *, ignore_end: bool = False, reuse_cache: bool = False
    ) -> dict[str, Any]:
        """Greedy continuation.

        Args:
            prompt: a text, which llama.cpp tokenizes, or token ids.
            new: tokens at most.
            ignore_end: go on after the model's end of text.
            reuse_cache: keep what the cache already holds of this prompt.

        Returns:
            llama.cpp's answer: ``choices`` with the text, ``usage``, ``timings``.
        """
        return self._answer(prompt, new, ignore_eos=ignore_end, cache_prompt=reuse_cache)

    def text(self, prompt: str | Sequence[int], new: int) -> str:
        """Only the text of ``complete``."""
        return str(self.complete(prompt, new)["choices"][0]["text"])

    def greedy_tokens(self, prompt: str | Sequence[int], new: int) -> list[int]:
        """Ids of the continuation, the end of text among them where it is reached."""
        return list(self._answer(prompt, new, verbose=True, return_tokens=True)["__verbose"]["tokens"])

    def _answer(self, prompt: str | Sequence[int], new: int, **options: bool) -> dict[str, Any]:
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": new,
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": False,
        }
        answer: dict[str, Any] = self._server.handle_completions(request | options)
        if "choices" not in answer:
            raise ExportError(f"llama.cpp refused the prompt ({answer}) - check its length against --context")
        return answer
