"""Which KV heads should keep everything: one budget rule, the same bytes, and nothing but the ranking of heads differs.

    python benchmarks/head_choice.py                    # about 15 minutes a task on two cores; a killed run goes on
    python benchmarks/head_choice.py --tasks passkey --ratio 0.25
    python benchmarks/head_choice.py --quick            # a look, below a minute

Rankings over all KV heads of the model, the best full as far as the budget goes (``retrieval-kv``'s rule): by the order
in which an answer's loss lets them go (``elimination``, what ``retrieval-kv``'s profile holds), by their attention to
answers (``attention-mass``), by distance from the layer's semantic center as in Task-KV (``farthest``), by its
opposite (``nearest``), and by chance (``random-0`` and so on). Distances are means over the built-in prompts: a static
choice, not Task-KV's choice per prompt. Samples and answers go into ``results/head_choice.jsonl``, means into
``results/head_choice.json``.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

from answers import compare, mean_distances, parser, quick, ratios, retrieval_scores
from attention_mass import TABLES, attention_mass

from thinkkv import sdk
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.evaluation.setting import Setting
from thinkkv.sdk.policies import Full, RetrievalKV

Scores = tuple[tuple[float, ...], ...]


def rankings(model: Any, tokenizer: Any, options: Namespace) -> dict[str, Scores]:
    """Scores of every KV head, [layers][KV heads], by the name of the ranking."""
    distance = mean_distances(model, tokenizer, options)
    found = {
        "elimination": retrieval_scores(model, tokenizer, options.profile),
        "attention-mass": attention_mass(model, tokenizer, tables=1 if options.quick else TABLES),
        "farthest": distance,
        "nearest": tuple(tuple(-score for score in layer) for layer in distance),
    }
    for seed in range(1 if options.quick else options.chances):
        chance = random.Random(seed)
        found[f"random-{seed}"] = tuple(tuple(chance.random() for _ in layer) for layer in distance)
    return found


def settings(scores: dict[str, Scores], shares: list[float]) -> list[Setting]:
    """The full cache, and every ranking at every ratio."""
    ranked = [
        Setting(name, RetrievalKV(head_scores=of), Budget(ratio=ratio))
        for name, of in scores.items()
        for ratio in shares
    ]
    return [Setting("full", Full(), Budget(ratio=1.0)), *ranked]


def main() -> None:
    """Evaluate what is missing, then summarise."""
    arguments = parser(__doc__, tasks="niah-single", ratio="0.25,0.15")
    arguments.add_argument("--chances", type=int, default=3, help="random rankings")
    options = quick(arguments.parse_args())
    model, tokenizer = sdk.load(options.model, dtype=options.dtype)
    compared = settings(rankings(model, tokenizer, options), ratios(options))
    compare(model, tokenizer, compared, options, "head_choice")


if __name__ == "__main__":
    main()
