"""The same keep rule in PyTorch: the yardstick for what a bundle generates.

``sdk.apply`` compacts the prompt as ever, with a policy whose full heads and lengths are the bundle's; where the next
token would find no room the oldest recent ones are dropped before, as the graph does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from thinkkv.export.onnx.slots import Slots
from thinkkv.sdk.block import LayerClasses
from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.patching import apply
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies.sinks_middle_recent import SinksMiddleRecent, Split


@dataclass(frozen=True)
class FixedSlots(SinksMiddleRecent):
    """A bundle's rule as a policy.

    Args:
        slots: what the other heads keep; their options of the same names follow from it.
        full: per layer, how many of the first KV heads keep everything.
    """

    name: ClassVar[str] = "fixed-slots"

    slots: Slots = field(kw_only=True)
    full: tuple[int, ...] = ()

    @classmethod
    def of(cls, slots: Slots, layers: tuple[LayerClasses, ...]) -> FixedSlots:
        """The policy of a bundle."""
        return cls(
            sinks=slots.sinks,
            recent=slots.recent,
            observation_window=slots.observation_window,
            pooling=slots.pooling,
            slots=slots,
            full=tuple(layer.full for layer in layers),
        )

    @property
    def always_kept(self) -> int:
        """A prompt that fits the slots."""
        return self.slots.capacity

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        """The first heads keep everything, the others their slots."""
        full = tuple(range(self.full[prompt.layer]))
        if prompt.tokens <= self.always_kept:
            return KeepPlan.everything(prompt, heterogeneous=full)
        scores = prompt.per_kv_head(prompt.window_scores(self.observation_window))
        recent = self.slots.in_use(prompt.tokens) - self.slots.fixed
        split = Split(len(full), self.sinks, self.slots.middle, recent)
        return KeepPlan(kept=self.keep(prompt, full, split, scores), heterogeneous=full)


@torch.inference_mode()
def greedy_tokens(
    model: Any, ids: list[int], new: int, slots: Slots | None, layers: tuple[LayerClasses, ...], stop: set[int]
) -> list[int]:
    """What the baked model generates with a bundle's keep rule.

    Args:
        model: the baked model, not patched.
        ids: prompt.
        new: tokens at most.
        slots: of the bounded heads; None where all are full.
        layers: classes per layer.
        stop: token ids that end the text.
    """
    if slots is None:
        return _continue(model, ids, new, None, None, stop)
    policy = FixedSlots.of(slots, layers)
    with apply(model, policy=policy, ratio=1.0, decode="bounded") as handle:
        return _continue(model, ids, new, handle.new_cache(), slots, stop)


def _continue(model: Any, ids: list[int], new: int, cache: Any, slots: Slots | None, stop: set[int]) -> list[int]:
    tokens: list[int] = []
    step = torch.tensor([ids])
    while len(tokens) < new:
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        step = out.logits[:, -1:].argmax(-1)
        tokens.append(int(step))
        if slots is not None:
            _make_room(cache, slots)
        if tokens[-1] in stop:
            break
    return tokens


def _make_room(cache: HeterogeneousCache, slots: Slots) -> None:
    """Drop the oldest recent tokens of every bounded head whose slots are full: they go before the next attention."""
    for store in (layer.store for layer in cache.layers if layer.store):
        for group in store.groups:
            if group.limit is not None and group.length >= slots.capacity:
                later = torch.arange(slots.fixed + slots.stride, group.length)
                store.keep(group, torch.cat([torch.arange(slots.fixed), later]).expand(len(group.index), -1))
