"""Hold what was written against PyTorch before it is put in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thinkkv.export.bake import Baked
from thinkkv.sdk.hidden_facts import builtin_prompts

SHORT, LONGEST, NEW = 64, 2048, 32
"""Tokens of the short prompt, of the long one at most, and generated after each."""


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


def verify_onnx(baked: Baked, folder: Path) -> Verified:
    """The bundle in ONNX Runtime against PyTorch with the same keep rule."""
    from thinkkv.export.onnx.session import Session
    from thinkkv.export.onnx.torch_path import greedy_tokens
    from thinkkv.export.onnx.write import slots_of

    baked.model.float()  # as the graph computes
    slots, stop = slots_of(baked.block), _stop(baked)
    session = Session(folder)
    prompts = _prompts(baked, slots.capacity if slots else 0)
    expected = [greedy_tokens(baked.model, ids, NEW, slots, baked.block.layers, stop) for ids in prompts]
    found = [list(session.start(len(ids) + NEW, slots).greedy(ids, NEW, stop)) for ids in prompts]
    hits = [
        _hits(session.start(len(ids) + NEW, slots).feed, ids, tokens)
        for ids, tokens in zip(prompts, expected, strict=True)
    ]
    return _compared(expected, found, sum(hits) / sum(map(len, expected)), "PyTorch with the bundle's keep rule")


def verify_gguf(baked: Baked, path: Path) -> Verified:
    """The file's text in llama.cpp, where that is installed, against the dense model's."""
    from thinkkv.export.llama_cpp import LlamaCpp, installed

    if not installed():
        return NOT_RUN
    baked.model.float()
    prompts = _prompts(baked, 4 * SHORT)
    runtime = LlamaCpp(path, context=max(map(len, prompts)) + NEW)
    stop, equal, compared = _stop(baked), True, 0
    for ids in prompts:
        out = baked.model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
        expected = [token for token in out if token not in stop]
        equal &= runtime.text(ids, NEW) == baked.tokenizer.decode(expected, skip_special_tokens=True)
        compared += len(out)
    return Verified(equal, compared, None, "PyTorch, dense")


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
