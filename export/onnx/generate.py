"""One prompt to one text in ONNX Runtime: the job behind ``thinkkv run``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkkv.export.onnx.session import Session, batch_refused
from thinkkv.export.onnx.slots import Slots
from thinkkv.export.onnx.tokenizer import BundleTokenizer
from thinkkv.patches.errors import BundleError, ExportError
from thinkkv.sdk.block import BLOCK_FILE, Block

GENAI_FILE = "genai_config.json"


@dataclass(frozen=True)
class BundleText:
    """A finished generation.

    Args:
        text: the new text.
        prompt_tokens, new_tokens: counts.
        prefill_seconds: until the first new token.
        decode_seconds: for the others.
        bytes: of the caches at the end.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    bytes: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "seconds": {"prefill": round(self.prefill_seconds, 4), "decode": round(self.decode_seconds, 4)},
            "bytes": self.bytes,
        }


def generate_bundle(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    chat: bool = True,
    threads: int | None = None,
    native: bool = False,
    echo: Callable[[str], None] | None = None,
) -> BundleText:
    """Greedy text of a verified bundle.

    Args:
        folder: of the bundle.
        prompt: the text; as a user message where ``chat`` is set and the tokenizer has a template.
        max_new_tokens: at most so many.
        chat: whether to apply the chat template.
        threads: of ONNX Runtime; None leaves the choice to it.
        native: attend by operators in C, the bundle's own or ones compiled here. They are code that runs as it is.
        echo: receives the text piece by piece.

    Raises:
        BundleError: the folder holds no runnable bundle.
        ExportError: the prompt does not fit the model's context, or there are no operators in C.
        UnsupportedGenerationError: it is a list of prompts.
    """
    if not isinstance(prompt, str):
        raise batch_refused(len(prompt), "call it for each prompt")
    config, slots = settings_of(folder)
    tokenizer = BundleTokenizer(folder)
    ids = tokenizer.encode(prompt, chat=chat)
    if len(ids) + max_new_tokens > config["context_length"]:
        raise ExportError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's context of "
            f"{config['context_length']} - shorten the prompt or lower --max-new-tokens"
        )
    eos = config["eos_token_id"]
    stop = {eos} if isinstance(eos, int) else set(eos)
    session = Session(folder, threads=threads, native=native)
    conversation = session.start(len(ids) + max_new_tokens, slots)
    tokens: list[int] = []
    shown = ""
    start = first = time.perf_counter()
    for token in conversation.greedy(ids, max_new_tokens, stop):
        if not tokens:
            first = time.perf_counter()
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if echo and not text.endswith("\ufffd"):  # half a character: wait for the rest
            echo(text[len(shown) :])
            shown = text
    end = time.perf_counter()
    return BundleText(
        text=tokenizer.decode(tokens),
        prompt_tokens=len(ids),
        new_tokens=len(tokens),
        prefill_seconds=first - start,
        decode_seconds=end - first,
        bytes=conversation.bytes,
    )


def settings_of(folder: Path) -> tuple[dict[str, Any], Slots | None]:
    """The model's part of ``genai_config.json``, and the slots of the bounded caches.

    Raises:
        BundleError: the folder holds no bundle that plain ONNX Runtime can run here, or one newer than this thinkkv.
    """
    Block.read(folder)
    try:
        config = json.loads((folder / GENAI_FILE).read_text(encoding="utf-8"))["model"]
        runtime = json.loads((folder / BLOCK_FILE).read_text(encoding="utf-8"))["onnx"]
        provider, slots = runtime["provider"], Slots(**runtime["slots"]) if runtime["slots"] else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{folder} is no ONNX bundle ({error}) - export one with `thinkkv export`") from error
    if provider != "cpu":
        raise BundleError(
            f"{folder} was built for {provider} - run it with onnxruntime-genai there, or export for the CPU"
        )
    return config, slots
