"""One prompt to one text on a patched model, with its times and bytes: the job behind ``thinkkv generate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TextStreamer

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.patching import apply
from thinkkv.sdk.policies import CacheDtype
from thinkkv.sdk.profile import HeadProfile
from thinkkv.sdk.report import Bytes, report


@dataclass(frozen=True)
class Generated:
    """A finished generation.

    Args:
        text: the new text.
        policy: what the cache kept by.
        prompt_tokens, new_tokens: counts.
        prefill_seconds: until the first new token.
        decode_seconds: for the others; without compiling.
        compile_seconds: for the step that compiled, None where none did.
        load_seconds: for a cache from a file, None where there was none.
        bytes: of the cache at the end.
    """

    text: str
    policy: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    bytes: Bytes
    compile_seconds: float | None = None
    load_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding; None where it made too few tokens to tell."""
        timed = self.new_tokens - 1 - (self.compile_seconds is not None)
        return timed / self.decode_seconds if timed > 0 else None

    def as_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {
            "text": self.text,
            "policy": self.policy,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": {name: round(seconds, 4) for name, seconds in self._seconds().items() if seconds is not None},
            "bytes": vars(self.bytes),
        }

    def _seconds(self) -> dict[str, float | None]:
        return {
            "load": self.load_seconds,
            "prefill": self.prefill_seconds,
            "compile": self.compile_seconds,
            "decode": self.decode_seconds,
        }


class _Watch(TextStreamer):
    """Notes when tokens arrive, and passes text on as it becomes printable."""

    def __init__(self, tokenizer: Any, echo: Callable[[str], None] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._echo = echo
        self.arrivals: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.arrivals.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._echo:
            self._echo(text)


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    policy: str | None = None,
    ratio: float | None = None,
    budget: int | None = None,
    profile: HeadProfile | Path | None = None,
    decode: Literal["append", "bounded"] = "append",
    cache_dtype: CacheDtype | None = None,
    compiled: bool = False,
    max_new_tokens: int = 200,
    temperature: float | None = None,
    chat: bool = True,
    echo: Callable[[str], None] | None = None,
) -> Generated:
    """Patch the model, generate, revert.

    Args:
        model, tokenizer: from ``sdk.load``.
        prompt: the text; as a user message where ``chat`` is set and the tokenizer has a template.
        policy, ratio, budget, profile, decode, cache_dtype, compiled: as for ``apply``.
        max_new_tokens: at most so many.
        temperature: sampling temperature; None decodes greedily.
        echo: receives the text piece by piece while it is generated.

    Raises:
        ThinkKVError: the prompt has no tokens, or does not fit the model's context.
    """
    ids = encode(tokenizer, prompt, chat=chat)
    check_context(model, len(ids), max_new_tokens)
    with apply(
        model,
        policy=policy,
        ratio=ratio,
        budget=budget,
        profile=profile,
        decode=decode,
        cache_dtype=cache_dtype,
        compiled=compiled,
    ) as handle:
        return answer(
            model, tokenizer, ids, handle.new_cache(), compiled=compiled, max_new_tokens=max_new_tokens,
            temperature=temperature, echo=echo,
        )  # fmt: skip


def answer(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    cache: HeterogeneousCache,
    *,
    compiled: bool,
    max_new_tokens: int,
    temperature: float | None,
    echo: Callable[[str], None] | None,
) -> Generated:
    """Generate on a model that is patched.

    Args:
        ids: of all that has been said, what the cache has seen included.
        cache: of this model, empty or not.
        model, tokenizer, compiled, max_new_tokens, temperature, echo: as for ``generate_text``.
    """
    watch = _Watch(tokenizer, echo)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    inputs = torch.tensor([list(ids)], device=model.device)
    start = time.perf_counter()
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        streamer=watch,
        **sampling,
    )
    new = out[0, len(ids) :]
    first, last = watch.arrivals[1], watch.arrivals[-1]  # arrival 0 is the prompt itself
    compiling = watch.arrivals[2] - first if compiled and len(new) > 1 else None
    held = report(cache)
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        policy=held.policy,
        prompt_tokens=len(ids),
        new_tokens=len(new),
        prefill_seconds=first - start,
        decode_seconds=last - first - (compiling or 0),
        compile_seconds=compiling,
        bytes=held.bytes,
    )


def check_context(model: Any, tokens: int, new_tokens: int) -> None:
    """Raise ThinkKVError where a prompt and what is to follow do not fit the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens + new_tokens > limit:
        raise ThinkKVError(
            f"{tokens} prompt tokens and {new_tokens} new ones exceed the model's context of {limit} - "
            "shorten the prompt or lower --max-new-tokens"
        )


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """Token ids of one prompt.

    Raises:
        ThinkKVError: it has none.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
    else:
        ids = tokenizer(prompt).input_ids
    if not ids:
        raise ThinkKVError("the prompt has no tokens - give it some text")
    return ids
