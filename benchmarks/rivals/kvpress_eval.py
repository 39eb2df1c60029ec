"""Answer the same samples with kvpress; run it in the venv that ``build.sh kvpress`` makes.

    python benchmarks/rivals/kvpress_eval.py --folder scratch --presses snapkv,adakv --ratio 0.4,0.25 --out rows.jsonl

Needs nothing of thinkkv. Rows have the keys of ``thinkkv eval``; ``cache_bytes`` is what the cache's tensors hold after
the compression, ``nominal_bytes`` what the ratio promises: presses that only mask hold more. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvpress
import torch
from share_found import share_found
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

SNAPKV_32 = {"window_size": 32, "kernel_size": 7}
"""As thinkkv's own, with the papers' window of 32; kvpress takes 64 unless told, which dilutes a short question."""

PRESSES = {
    "full": lambda removed: None,
    "snapkv": lambda removed: kvpress.SnapKVPress(removed),
    "snapkv-window-32": lambda removed: kvpress.SnapKVPress(removed, **SNAPKV_32),
    "adakv": lambda removed: kvpress.AdaKVPress(kvpress.SnapKVPress(removed)),
    "adakv-window-32": lambda removed: kvpress.AdaKVPress(kvpress.SnapKVPress(removed, **SNAPKV_32)),
    "pyramidkv": lambda removed: kvpress.PyramidKVPress(removed),
    "streaming-llm": lambda removed: kvpress.StreamingLLMPress(removed),
    "expected-attention": lambda removed: kvpress.ExpectedAttentionPress(removed),
    "kvzip": lambda removed: kvpress.KVzipPress(removed),
}


def main() -> None:
    """Append the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what samples.py wrote")
    parser.add_argument("--presses", default=",".join(PRESSES))
    parser.add_argument("--ratio", default="0.4,0.25,0.15", help="shares of the cache to keep")
    parser.add_argument("--question", default="in-window,after")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    done = (
        {key(json.loads(line)) for line in arguments.out.read_text().splitlines()} if arguments.out.exists() else set()
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder / "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "checkpoint", dtype=arguments.dtype).eval()
    samples = [json.loads(line) for line in (arguments.folder / "samples.jsonl").read_text().splitlines()]
    with arguments.out.open("a") as file:
        for row, sample in wanted(samples, arguments):
            if key(row) not in done:
                file.write(json.dumps(row | answer(model, tokenizer, row, sample)) + "\n")
                file.flush()


def wanted(samples: list[dict[str, Any]], arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every sample under every setting."""
    for sample in samples:
        for question in arguments.question.split(","):
            for press in arguments.presses.split(","):
                for ratio in [1.0] if press == "full" else [float(text) for text in arguments.ratio.split(",")]:
                    row = {"task": sample["task"], "sample": sample["sample"], "question": question}
                    yield row | {"policy": f"kvpress-{press}", "ratio": ratio}, sample


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from the others."""
    return row["task"], row["sample"], row["question"], row["policy"], row["ratio"]


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, row: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    """Prefill under the press, then greedy tokens without it."""
    context, question = sample["context"], sample["question"]
    compressed = context + question if row["question"] == "in-window" else context
    press = PRESSES[row["policy"].removeprefix("kvpress-")](1 - row["ratio"])
    cache = DynamicCache()
    if press is None:
        out = model(torch.tensor([compressed]), past_key_values=cache, logits_to_keep=1)
    else:
        with press(model):
            out = model(torch.tensor([compressed]), past_key_values=cache, logits_to_keep=1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    place = len(compressed)
    following = [] if row["question"] == "in-window" else question
    said: list[int] = []
    while len(said) < sample["new_tokens"]:
        if following:  # positions go on where the prompt ended, however much of it was evicted
            at = torch.arange(place, place + len(following))[None]
            out = model(torch.tensor([following]), past_key_values=cache, position_ids=at, logits_to_keep=1)
            place += len(following)
        token = int(out.logits[0, -1].argmax())
        if token == model.generation_config.eos_token_id:
            break
        said.append(token)
        following = [token]
    text = tokenizer.decode(said, skip_special_tokens=True)
    config = model.config
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    return {
        "context": len(context) + len(question),
        "score": share_found(sample["answers"], text),
        "said": text,
        "cache_bytes": held,
        "nominal_bytes": int(row["ratio"] * len(compressed) * size),
    }


if __name__ == "__main__":
    main()
