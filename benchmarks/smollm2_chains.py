"""Chains of thought side by side: a run's model after each of its training stages, on the problems of its last table.

    thinkkv train recipes/smollm2.yaml
    python benchmarks/smollm2_chains.py thinkkv-out/train-smollm2 --out benchmarks/results/smollm2/chains.md

Sampled at the recipe's temperature, with one seed, from the adapter that each stage left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from thinkkv import sdk


def chains(run: Path, model: Any, tokenizer: Any, prompts: list[str], new: int) -> Iterator[tuple[str, list[str]]]:
    """Each stage that trained, and its model's continuations."""
    for weights in sorted(run.glob("stages/*/weights")):
        adapted = PeftModel.from_pretrained(model, str(weights)).eval()
        yield weights.parent.name, [continuation(adapted, tokenizer, prompt, new) for prompt in prompts]
        model = adapted.unload()


def continuation(model: Any, tokenizer: Any, prompt: str, new: int) -> str:
    """A sampled text and how many tokens it has."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    torch.manual_seed(0)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, max_new_tokens=new, do_sample=True, temperature=0.7)[0, ids.shape[1] :]
    text = tokenizer.decode(out, skip_special_tokens=True).strip()
    return f"{text}\n({len(out)} tokens)"


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = (arguments.run / "completions.jsonl").read_text(encoding="utf-8").splitlines()
    # The table's prompts have lost the beginning token.
    prompts = ["<|im_start|>" + json.loads(line)["prompt"] for line in lines[: arguments.problems]]
    model, tokenizer = sdk.load(arguments.model, dtype="float32")
    found = dict(chains(arguments.run, model, tokenizer, prompts, arguments.new))
    text = "# Chains after each stage\n"
    for i, prompt in enumerate(prompts):
        text += f"\n## {prompt.split('problem: ')[-1].split('=')[0].strip()}\n"
        for stage, continuations in found.items():
            text += f"\nAfter `{stage}`:\n\n```\n{continuations[i]}\n```\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
