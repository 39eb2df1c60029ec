"""Greedy text of a GGUF file in stock llama.cpp, through the prebuilt package xllamacpp."""

from __future__ import annotations

from collections.abc import Sequence
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
        request = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": new,
            "temperature": 0.0,
            "top_k": 1,
            "cache_prompt": reuse_cache,
            "ignore_eos": ignore_end,
        }
        answer: dict[str, Any] = self._server.handle_completions(request)
        if "choices" not in answer:
            raise ExportError(f"llama.cpp refused the prompt ({answer}) - check its length against --context")
        return answer

    def text(self, prompt: str | Sequence[int], new: int) -> str:
        """Only the text of ``complete``."""
        return str(self.complete(prompt, new)["choices"][0]["text"])
