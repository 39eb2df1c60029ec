"""A policy on PyTorch, or stock transformers with its own cache and attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache

from thinkkv.sdk import models
from thinkkv.sdk.evaluation.setting import Setting, settings
from thinkkv.sdk.patching import apply
from thinkkv.sdk.profile import HeadProfile
from thinkkv.sdk.report import report
from thinkkv.sdk.speed.contender import Contender, Held
from thinkkv.sdk.speed.prompt import prompt_ids

STOCK = "stock"
"""Name of the contender that is not patched."""


class TorchContender(Contender):
    """One setting on a model that all contenders of a comparison share.

    Args:
        model: not patched; it is patched while the contender is ready.
        setting: the policy; None for stock transformers.
        profile: that fixes its classes.
    """

    runtime = "torch"

    def __init__(self, model: Any, setting: Setting | None, profile: HeadProfile | None = None) -> None:
        self._model, self._setting, self._profile = model, setting, profile
        self.policy = setting.name if setting else STOCK
        self.ratio = setting.ratio if setting else 1.0
        self._cache: Any = None
        self._token: Any = None
        self._new_cache: Any = None

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Patch the model, without gradients."""
        with torch.inference_mode():
            if self._setting is None:
                self._new_cache = lambda: DynamicCache(config=self._model.config)
                yield
                return
            with apply(
                self._model, policy=self._setting.policy, ratio=self._setting.ratio, profile=self._profile
            ) as handle:
                self._new_cache = handle.new_cache
                yield

    def prefill(self, ids: Sequence[int], new_tokens: int) -> None:
        """One forward over the prompt."""
        self._cache = None  # frees the last one before the next fills
        self._cache = self._new_cache()
        self._forward(torch.tensor([list(ids)], device=self._model.device))

    def step(self) -> None:
        """One forward of one token."""
        self._forward(self._token)

    def held(self) -> Held:
        """From the report, or the tensors of the stock cache."""
        if self._setting is None:
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)
            return Held(size, size, size)
        found = report(self._cache).bytes
        return Held(found.physical, found.used, found.full)

    def _forward(self, ids: torch.Tensor) -> None:
        out = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._token = out.logits[:, -1:].argmax(-1)


def of_job(job: Mapping[str, Any]) -> tuple[TorchContender, list[int]]:
    """Contender and prompt for a process of its own.

    Args:
        job: ``model, dtype, policy, ratio, profile, threads, context``.
    """
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    model, tokenizer = models.load(job["model"], dtype=job["dtype"])
    profile = HeadProfile.load(job["profile"]) if job["profile"] else None
    setting = None if job["policy"] == STOCK else settings([job["policy"]], [job["ratio"]])[0]
    return TorchContender(model, setting, profile), prompt_ids(tokenizer, job["context"])
