"""Hold what was written against PyTorch before it is put in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinkkv.export.bake import Baked
from thinkkv.patches.errors import ExportError
from thinkkv.sdk.hidden_facts import builtin_prompts

SHORT, LONGEST, NEW = 64, 2048, 32
"""Tokens of the short prompt, of the long one at most, and generated after each."""

CLOSE = 0.02
"""Lead of the best token over the next that counts as none, in standard deviations of the logits.

llama.cpp rounds activations to float16, which moved such leads by up to .005."""

PROBE = "It's 1234567 o'clock, DON'T\n\n\n\tpanic:  3.14   spaces \r\n café, Größe, 北京 2024, привет 🙂 x"
"""Where tokenizers split differently: digits, contractions, runs of spaces, other scripts."""


@dataclass(frozen=True)
class Verified:
    """What was found.

    Args:
        greedy_tokens_equal: as many greedy tokens as compared are those of PyTorch; None where nothing could be run.
        compared: tokens compared.
        agreement: share of tokens that the format predicts like PyTorch when fed PyTorch's text.
        against: what was compared with.
    """

    greedy_tokens_equal: bool | None
    compared: int
    agreement: float | None
    against: str


NOT_RUN = Verified(None, 0, None, "not run")


def verify_checkpoint(baked: Baked, folder: Path) -> Verified:
    """The checkpoint, loaded anew and patched, against the baked model patched alike."""
    from thinkkv.sdk.baked import handle_of, load

    loaded, _ = load(folder)
    handle = handle_of(loaded)
    from thinkkv.sdk.patching import apply

    def tokens(model: Any, ids: list[int]) -> list[int]:
        out = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        found: list[int] = out[0, len(ids) :].tolist()
        return found

    prompts = _prompts(baked, baked.block.kept)
    budget = {"ratio": baked.block.ratio} if baked.block.budget is None else {"budget": baked.block.budget}
    with apply(baked.model, policy=handle.policy.name, profile=baked.profile, **budget):
        expected = [tokens(baked.model, ids) for ids in prompts]
    found = [tokens(loaded, ids) for ids in prompts]
    return _compared(expected, found, None, f"PyTorch, {handle.policy.name}")


def verify_onnx(baked: Baked, folder: Path, *, native: bool = False) -> Verified:
    """The bundle in ONNX Runtime, with its own library if it is ``native``, against PyTorch with the same keep rule."""
    from thinkkv.export.onnx.session import Session
    from thinkkv.export.onnx.torch_path import greedy_tokens
    from thinkkv.export.onnx.write import slots_of

    baked.model.float()  # as the graph computes
    slots, stop = slots_of(baked.block), _stop(baked)
    session = Session(folder, native=native)
    prompts = _prompts(baked, slots.capacity if slots else 0)
    expected = [greedy_tokens(baked.model, ids, NEW, slots, baked.block.layers, stop) for ids in prompts]
    found = [list(session.start(len(ids) + NEW, slots).greedy(ids, NEW, stop)) for ids in prompts]
    hits = [
        _hits(session.start(len(ids) + NEW, slots).feed, ids, tokens)
        for ids, tokens in zip(prompts, expected, strict=True)
    ]
    return _compared(expected, found, sum(hits) / sum(map(len, expected)), "PyTorch with the bundle's keep rule")


def verify_gguf(baked: Baked, path: Path) -> Verified:
    """The file in llama.cpp, where that is installed, against the dense model with the file's float16 weights.

    Raises:
        ExportError: llama.cpp reads text as other tokens than the tokenizer.
    """
    from thinkkv.export.llama_cpp import LlamaCpp, installed

    if not installed():
        return NOT_RUN
    prompts = _prompts(baked, 4 * SHORT)
    runtime = LlamaCpp(path, context=max(map(len, prompts)) + NEW)
    _check_reading(baked.tokenizer, runtime.tokens)
    equal, compared = True, 0
    with _rounded_to_float16(baked.model):
        for ids in prompts:
            prompt = torch.tensor([ids])
            out = baked.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),  # or a begin that is the padding token, too, would be hidden
                max_new_tokens=NEW,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            expected, found = out.sequences[0, len(ids) :].tolist(), runtime.greedy_tokens(ids, NEW)
            same = _equal_until(expected, found)
            if expected != found:
                ended = same == min(len(expected), len(found))
                equal &= not ended and _is_close_call(out.logits[same][0].float(), found[same])
            compared += same
    return Verified(equal, compared, None, "PyTorch, dense, weights rounded to float16")


def _check_reading(tokenizer: Any, read: Callable[[str], list[int]]) -> None:
    """Text as the model gets it: in the chat template, where there is one."""
    text = "\n\n".join([PROBE, *builtin_prompts()])
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    expected, found = tokenizer(text).input_ids, read(text)
    if expected != found:
        same = _equal_until(expected, found)
        raise ExportError(
            f"llama.cpp reads text as other tokens than the tokenizer does: {found[same : same + 4]} instead of "
            f"{expected[same : same + 4]} after {tokenizer.decode(expected[max(same - 8, 0) : same])!r} - "
            "use --format safetensors, and please report the model"
        )


@contextmanager
def _rounded_to_float16(model: Any) -> Iterator[None]:
    """Matrices as a float16 file has them, computed with in float32; after that the model is what it was."""
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in before:
            parameter.data = data.half().float() if data.ndim > 1 else data.float()
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _equal_until(expected: list[int], found: list[int]) -> int:
    return next(
        (i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(found)),
    )


def _is_close_call(logits: torch.Tensor, token: int) -> bool:
    """Whether a token is so near the best that llama.cpp's rounding of activations to float16 may prefer it."""
    return bool(logits.max() - logits[token] < CLOSE * logits.std())


def _prompts(baked: Baked, capacity: int) -> list[list[int]]:
    """A short prompt of real text, and one longer than the bounded cache where that is affordable."""
    ids: list[int] = baked.tokenizer("\n\n".join(builtin_prompts())).input_ids
    context = baked.model.config.max_position_embeddings
    long = min(capacity + SHORT, LONGEST, context - NEW, len(ids))
    return [ids[: min(SHORT, long)], ids[:long]]


def _hits(feed: Callable[[list[int]], Any], ids: list[int], tokens: list[int]) -> int:
    hits, following = 0, ids
    for token in tokens:
        hits += int(feed(following).argmax()) == token
        following = [token]
    return hits


def _compared(expected: list[list[int]], found: list[list[int]], agreement: float | None, against: str) -> Verified:
    return Verified(expected == found, sum(map(len, expected)), agreement, against)


def _stop(baked: Baked) -> set[int]:
    eos = baked.model.generation_config.eos_token_id
    return {eos} if isinstance(eos, int) else set(eos or ())
