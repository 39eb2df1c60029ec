"""Does a profile of one kind of task serve another? Task-KV's classes per prompt, and fixed by prompts of three kinds.

    python benchmarks/profile_transfer.py               # about half an hour on two cores; a killed run goes on
    python benchmarks/profile_transfer.py --quick       # a look, below a minute

``task-kv`` tells its full heads apart for each prompt. ``profile-TASK`` fixes them by the mean distance from the
semantic center over eight prompts of that task, of another seed than the samples. Everything else is the same.
Samples and answers go into ``results/profile_transfer.jsonl``, means into ``results/profile_transfer.json``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from answers import compare, parser, quick, ratios, task_of

from thinkkv import sdk
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.calibration import calibrate
from thinkkv.sdk.evaluation.setting import Setting
from thinkkv.sdk.policies import Full, Policy, TaskKV

SOURCES = ("niah-single", "word-count", "perplexity")
PROMPTS, SEED = 8, 7


def calibrated(model: Any, tokenizer: Any, source: str, options: Namespace) -> Policy:
    """Task-KV with the classes that prompts of a task fix."""
    prompts = 1 if options.quick else PROMPTS
    samples = (task_of(source).sample(tokenizer, options.context, number, SEED) for number in range(prompts))
    prompts = [tokenizer.decode(sample.context + sample.question) for sample in samples]
    return calibrate(model, tokenizer, prompts).fix(TaskKV())


def main() -> None:
    """Evaluate what is missing, then summarise."""
    arguments = parser(__doc__, tasks="niah-single,word-count", ratio="0.5")
    options = quick(arguments.parse_args())
    model, tokenizer = sdk.load(options.model, dtype=options.dtype)
    policies: dict[str, Policy] = {"task-kv": TaskKV()}
    policies |= {f"profile-{source}": calibrated(model, tokenizer, source, options) for source in SOURCES}
    compared = [Setting("full", Full(), Budget(ratio=1.0))]
    compared += [Setting(name, policy, Budget(ratio=at)) for name, policy in policies.items() for at in ratios(options)]
    compare(model, tokenizer, compared, options, "profile_transfer")


if __name__ == "__main__":
    main()
