"""Task-KV's own choice of heads, made for each prompt within each layer, beside other choices with the same bytes.

    python benchmarks/head_choice_per_prompt.py         # about an hour on two cores; a killed run goes on
    python benchmarks/head_choice_per_prompt.py --quick # a look, below a minute

At half of the bytes one KV head of SmolLM2's three is full in every layer: the one farthest from the semantic center of
this prompt (``farthest``, Task-KV), the nearest one (``nearest``), the one that is farthest on average
(``farthest-profile``), the one that answers' losses let go last (``elimination``), or one by chance (``random-0`` and
so on). At three quarters two are full: Task-KV's farthest and nearest (``farthest-and-nearest``), or the two farthest
(``two-farthest``). Everything else is Task-KV's. Samples and answers go into ``results/head_choice_per_prompt.jsonl``,
means into ``results/head_choice_per_prompt.json``.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import torch
from answers import compare, mean_distances, parser, quick, retrieval_scores

from thinkkv import sdk
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.evaluation.setting import Setting
from thinkkv.sdk.plan import PromptView
from thinkkv.sdk.policies import Full, TaskKV

HALF, THREE_QUARTERS = Budget(ratio=0.5), Budget(ratio=0.75)
CHANCES = 3


class NearestFirst(TaskKV):
    """Task-KV with its ranking turned around."""

    def _distances(self, prompt: PromptView, scores: torch.Tensor) -> torch.Tensor:
        return -super()._distances(prompt, scores)


def settings(model: Any, tokenizer: Any, options: Namespace) -> list[Setting]:
    """The full cache, and every choice of heads."""
    average = mean_distances(model, tokenizer, options)
    one = {
        "farthest": TaskKV(),
        "nearest": NearestFirst(),
        "farthest-profile": TaskKV(head_scores=average),
        "elimination": TaskKV(head_scores=retrieval_scores(model, tokenizer, options.profile)),
    }
    for seed in range(1 if options.quick else CHANCES):
        chance = random.Random(seed)
        one[f"random-{seed}"] = TaskKV(head_scores=tuple(tuple(chance.random() for _ in layer) for layer in average))
    two_of_three = TaskKV(beta=2 / 3, top_layer_heads=2)
    two = {
        "farthest-and-nearest": two_of_three,
        "two-farthest": TaskKV(beta=2 / 3, top_layer_heads=2, nearest="none"),
    }
    return [
        Setting("full", Full(), Budget(ratio=1.0)),
        *(Setting(name, policy, HALF) for name, policy in one.items()),
        *(Setting(name, policy, THREE_QUARTERS) for name, policy in two.items()),
    ]


def main() -> None:
    """Evaluate what is missing, then summarise."""
    options = quick(parser(__doc__, tasks="niah-single,passkey").parse_args())
    model, tokenizer = sdk.load(options.model, dtype=options.dtype)
    compare(model, tokenizer, settings(model, tokenizer, options), options, "head_choice_per_prompt")


if __name__ == "__main__":
    main()
