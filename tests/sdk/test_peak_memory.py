"""A layer's full keys are gone before the next layer is compacted: the peak is one full layer, not all."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tiny_models import Case
from thinkkv import sdk
from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies import TaskKV


@dataclass(frozen=True)
class Watching(TaskKV):
    """Task-KV that notes at every layer whose full-length states are still alive."""

    states: list[Any] = field(default_factory=list, hash=False, compare=False)
    alive: list[int] = field(default_factory=list, hash=False, compare=False)

    def plan(self, prompt: PromptView, budget: LayerBudget) -> KeepPlan:
        whole = prompt.keys._base if prompt.keys._base is not None else prompt.keys
        self.states.append(weakref.ref(whole))
        self.alive.append(sum(state() is not None for state in self.states))
        return super().plan(prompt, budget)


def test_only_one_layer_is_whole_at_a_time():
    model = Case("llama", kv_heads=4).model()
    policy = Watching(sinks=2, recent=8, observation_window=4)
    with torch.no_grad(), sdk.apply(model, policy=policy, ratio=0.4) as handle:
        cache = handle.new_cache()
        model(torch.randint(1, 97, (1, 200)), past_key_values=cache)
    assert policy.alive == [1, 1, 1]
    assert all(state() is None for state in policy.states)
    report = handle.report(cache)
    assert report.bytes.used < 0.41 * report.bytes.full
