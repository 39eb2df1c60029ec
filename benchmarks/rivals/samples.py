"""Write samples of ``thinkkv eval`` as JSON lines of token ids, and the checkpoint, for rivals in venvs of their own.

    python benchmarks/rivals/samples.py --model smollm2-135m --tasks niah-single,passkey --context 2000 --out scratch

Writes ``scratch/checkpoint`` and ``scratch/samples.jsonl``: ``task, size, sample, context, question, answers,
expected, new_tokens``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from thinkkv import sdk
from thinkkv.sdk.evaluation.runner import ANSWER_MARGIN
from thinkkv.sdk.evaluation.tasks import GENERATED, task_named


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", default="niah-single,niah-multikey,passkey,haystack-reasoning")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    names = arguments.tasks.split(",")
    if unknown := set(names) - set(GENERATED):
        parser.error(f"only generated tasks have samples to write, not {', '.join(sorted(unknown))}")
    model, tokenizer = sdk.load(arguments.model)
    model.save_pretrained(arguments.out / "checkpoint")
    tokenizer.save_pretrained(arguments.out / "checkpoint")
    with (arguments.out / "samples.jsonl").open("w", encoding="utf-8") as file:
        for name in names:
            task = task_named(name, Path.read_text)
            for index in range(arguments.samples):
                found = task.sample(tokenizer, arguments.context, index, arguments.seed)
                expected = tokenizer(found.sample.expected, add_special_tokens=False).input_ids
                answer = tokenizer(f" {found.sample.expected}", add_special_tokens=False).input_ids
                row = {"task": name, "size": arguments.context, "sample": index}
                row |= {"context": found.context, "question": found.question}
                row |= {
                    "answers": found.sample.answers,
                    "new_tokens": ANSWER_MARGIN + len(expected),
                    "expected": answer,
                }
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
