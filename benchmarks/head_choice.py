"""Which KV heads should keep everything: one budget rule, the same bytes, and nothing but the ranking of heads differs.

    python benchmarks/head_choice.py                    # about 15 minutes a task on two cores; a killed run goes on
    python benchmarks/head_choice.py --tasks passkey --ratio 0.25

Rankings over all KV heads of the model, the best full as far as the budget goes (``retrieval-kv``'s rule): by the order
in which an answer's loss lets them go (``elimination``, what ``retrieval-kv``'s profile holds), by their attention to
answers (``attention-mass``), by distance from the layer's semantic center as in Task-KV (``farthest``), by its
opposite (``nearest``), and by chance (``random-0`` and so on). Distances are means over the built-in prompts: a static
choice, not Task-KV's choice per prompt. Samples and answers go into ``results/head_choice.jsonl``, means into
``results/head_choice.json``.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from attention_mass import attention_mass
from environment import save

from thinkkv import sdk
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.calibration import calibrate
from thinkkv.sdk.cli.console import track
from thinkkv.sdk.evaluation.journal import Journal
from thinkkv.sdk.evaluation.rows import rows
from thinkkv.sdk.evaluation.runner import Evaluation
from thinkkv.sdk.evaluation.setting import Setting
from thinkkv.sdk.evaluation.tasks import task_named
from thinkkv.sdk.policies import Full, RetrievalKV

RESULTS = Path(__file__).parent / "results"
Scores = tuple[tuple[float, ...], ...]


def rankings(model: Any, tokenizer: Any, chances: int) -> dict[str, Scores]:
    """Scores of every KV head, [layers][KV heads], by the name of the ranking."""
    distance = calibrate(model, tokenizer, score="distance").scores
    found = {
        "elimination": calibrate(model, tokenizer, score="retrieval").scores,
        "attention-mass": attention_mass(model, tokenizer),
        "farthest": distance,
        "nearest": tuple(tuple(-score for score in layer) for layer in distance),
    }
    for seed in range(chances):
        chance = random.Random(seed)
        found[f"random-{seed}"] = tuple(tuple(chance.random() for _ in layer) for layer in distance)
    return found


def settings(scores: dict[str, Scores], ratios: list[float]) -> list[Setting]:
    """The full cache, and every ranking at every ratio."""
    ranked = [
        Setting(name, RetrievalKV(head_scores=of), Budget(ratio=ratio))
        for name, of in scores.items()
        for ratio in ratios
    ]
    return [Setting("full", Full(), Budget(ratio=1.0)), *ranked]


def main() -> None:
    """Evaluate what is missing, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", default="niah-single")
    parser.add_argument("--ratio", default="0.25,0.15")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=25)
    parser.add_argument("--chances", type=int, default=3, help="random rankings")
    options = parser.parse_args()
    model, tokenizer = sdk.load(options.model, dtype=options.dtype)
    ratios = [float(ratio) for ratio in options.ratio.split(",")]
    compared = settings(rankings(model, tokenizer, options.chances), ratios)
    evaluation = Evaluation(model, tokenizer, compared, profiles={})
    tasks = [task_named(name, lambda path: path.read_text(encoding="utf-8")) for name in options.tasks.split(",")]
    cells = evaluation.cells(tasks, [options.context], ["in-window", "after"])
    journal = Journal(RESULTS / "head_choice.jsonl", evaluation.identity)
    evaluation.run(cells, options.samples, journal, track)
    save(RESULTS / "head_choice.json", {"rows": rows(journal, cells, compared, options.samples)})


if __name__ == "__main__":
    main()
