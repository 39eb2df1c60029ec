"""Answer the same samples from transformers' QuantizedCache; run it in the venv that ``build.sh transformers`` makes.

    python benchmarks/rivals/quantized_eval.py --folder scratch --settings quanto-4,quanto-2 --out rows.jsonl

Needs nothing of thinkkv. Every token is kept, in a few bits. A text is attended to once, for all settings and all
questions about it: what a cache is given does not depend on its bits. Rows have the keys of ``thinkkv eval``; ``ratio``
is what the bits promise, ``cache_bytes`` what the tensors hold after the prompt. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from share_found import share_found
from tensor_bytes import tensor_bytes
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, QuantizedCache

PACKAGES = ("torch", "transformers", "optimum-quanto", "hqq")
QUESTIONS = ("in-window", "after")
FULL = "full"
SETTINGS: dict[str, dict[str, Any] | None] = {
    FULL: None,
    "quanto-4": {"backend": "quanto", "nbits": 4},
    "quanto-2": {"backend": "quanto", "nbits": 2},
    "hqq-8": {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
    "fp8": {"backend": "fp8"},
}
"""Arguments of ``QuantizedCache``; groups of 64 numbers, and 128 exact new tokens, are its defaults. HQQ in 4 bits
refuses an odd number of tokens."""


@dataclass(frozen=True)
class Read:
    """A text that was attended to.

    Args:
        ids: its tokens.
        cache: everything.
        logits: [1, V] after it.
    """

    ids: Sequence[int]
    cache: DynamicCache
    logits: torch.Tensor


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what samples.py wrote")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="the full cache is always among them")
    parser.add_argument("--question", choices=QUESTIONS, default="after")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    names = list(dict.fromkeys([FULL, *arguments.settings.split(",")]))
    if unknown := set(names) - set(SETTINGS):
        parser.error(f"no such settings: {', '.join(sorted(unknown))} - choose from {', '.join(SETTINGS)}")
    if not arguments.out.exists():
        arguments.out.write_text(json.dumps(run_of(arguments)) + "\n")
    done = {key(json.loads(line)) for line in arguments.out.read_text().splitlines()[1:]}
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "checkpoint", dtype=arguments.dtype).eval()
    samples = [json.loads(line) for line in (arguments.folder / "samples.jsonl").read_text().splitlines()]
    text: Read | None = None
    for sample in samples:
        missing = [name for name in names if key(row_of(sample, arguments.question, name)) not in done]
        if not missing:
            continue
        compressed = sample["context"] + (sample["question"] if arguments.question == "in-window" else [])
        if text is None or text.ids != compressed:
            text = read(model, compressed)
        with arguments.out.open("a") as file:
            for row in answers(model, tokenizer, sample, text, arguments.question, missing):
                file.write(json.dumps(row) + "\n")


def run_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip() or None,
        "dtype": arguments.dtype,
        "machine": {"system": platform.platform(), "processor": processor, "cores": os.cpu_count()},
        "versions": {found.name: found.version for found in distributions() if found.name in PACKAGES},
    }


def row_of(sample: dict[str, Any], question: str, name: str) -> dict[str, Any]:
    """What tells a row from the others."""
    setting = SETTINGS[name]
    ratio = setting.get("nbits", 8) / 16 if setting else 1.0
    row = {"task": sample["task"], "question": question, "context": sample["size"], "sample": sample["sample"]}
    return row | {"policy": name if name == FULL else f"transformers-{name}", "ratio": ratio}


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Of a row."""
    return row["task"], row["sample"], row["question"], row["policy"]


@torch.inference_mode()
def read(model: Any, ids: Sequence[int]) -> Read:
    """Attend to a text."""
    cache = DynamicCache(config=model.config)
    out = model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    return Read(ids, cache, out.logits[:, -1])


@torch.inference_mode()
def answers(
    model: Any, tokenizer: Any, sample: dict[str, Any], text: Read, question: str, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One sample under every setting."""
    asked = sample["question"] if question == "after" else []
    expected = torch.tensor(sample["expected"])
    reference = predicted(model, deepcopy(text.cache), text, asked, sample["expected"])
    for name in names:
        cache = stored(text.cache, model, SETTINGS[name])
        held = sum(tensor_bytes(vars(layer)) for layer in cache.layers)
        mine = reference if name == FULL else predicted(model, cache, text, asked, sample["expected"])
        said = generated(model, stored(text.cache, model, SETTINGS[name]), text, asked, sample["new_tokens"])
        words = tokenizer.decode(said, skip_special_tokens=True)
        yield row_of(sample, question, name) | {
            "score": share_found(sample["answers"], words),
            "said": words,
            "cache_bytes": held,
            "loss": -float(mine.gather(1, expected[:, None]).mean()),
            "divergence": float((reference.exp() * (reference - mine)).sum(dim=-1).mean().clamp(min=0)),
        }


def stored(whole: DynamicCache, model: Any, setting: dict[str, Any] | None) -> Cache:
    """What the setting leaves of a cache after the prompt."""
    if setting is None:
        return deepcopy(whole)
    cache = QuantizedCache(config=model.config, **setting)
    for layer, full in zip(cache.layers, whole.layers, strict=True):
        layer.update(full.keys, full.values)
    return cache


def predicted(model: Any, cache: Cache, text: Read, asked: Sequence[int], expected: Sequence[int]) -> torch.Tensor:
    """[T, V] float32 log-probabilities in the places of the right answer's tokens."""
    out = model(torch.tensor([[*asked, *expected]]), past_key_values=cache)
    logits = torch.cat([text.logits, out.logits[0]])[len(asked) : -1]
    return torch.log_softmax(logits.float(), dim=-1)


def generated(model: Any, cache: Cache, text: Read, asked: Sequence[int], new_tokens: int) -> list[int]:
    """A greedy answer."""
    logits = text.logits[0]
    if asked:
        logits = model(torch.tensor([asked]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
    said: list[int] = []
    while (token := int(logits.argmax())) != model.generation_config.eos_token_id:
        said.append(token)
        if len(said) == new_tokens:
            break
        logits = model(torch.tensor([[token]]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return said


if __name__ == "__main__":
    main()
