"""Does an exported bundle say what PyTorch says? Greedy tokens and perplexity over real text.

    python benchmarks/export_equality.py --out benchmarks/results/export_equality.json
    python benchmarks/export_equality.py --quick        # a look, below 3 minutes

A float32 ONNX bundle must give the greedy tokens of the PyTorch path with the same profile and keep rule, by its own
definitions and with operators in C (``native``). Quantized weights cannot: for them the rows say how often they
predict the same token when fed the same text, and the perplexity. A float16 GGUF file in llama.cpp must give the text
of the dense PyTorch model with the same rounded weights; close calls may fall otherwise, as other sums round.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import RETRIEVAL
from environment import save

from thinkkv import sdk
from thinkkv.export.bake import Baked, bake
from thinkkv.export.gguf import write_gguf
from thinkkv.export.llama_cpp import LlamaCpp
from thinkkv.export.onnx.session import Session
from thinkkv.export.onnx.torch_path import greedy_tokens
from thinkkv.export.onnx.write import slots_of, write_onnx
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.hidden_facts import builtin_prompts
from thinkkv.sdk.policies import policy_named
from thinkkv.sdk.profile import SCORES, score_for

QUICK = {"prompts": [300], "new": 20, "before": 800, "scored": 32, "quantize": ["none"], "profile": RETRIEVAL}
TEXT = Path(sdk.__path__[0]) / "prompts" / "demo.txt"


def main() -> None:
    """Export, compare, write rows."""
    arguments = _arguments()
    model, tokenizer = sdk.load(arguments.model, dtype="float32")
    given, score = arguments.profile, score_for(arguments.policy)
    profile = sdk.HeadProfile.load(given) if given else sdk.calibrate(model, tokenizer, score=score)
    baked = bake(
        model,
        tokenizer,
        policy=policy_named(arguments.policy),
        budget=Budget(ratio=arguments.ratio),
        profile=profile,
        label=arguments.model,
    )
    ids = text_ids(tokenizer)
    starts = range(0, 97 * len(arguments.prompts), 97)
    prompts = [ids[start : start + length] for start, length in zip(starts, arguments.prompts, strict=True)]
    expected = [_torch(baked, prompt, arguments.new) for prompt in prompts]
    prompt, following = ids[-arguments.before - arguments.scored : -arguments.scored], ids[-arguments.scored :]
    full = _full_cache_perplexity(baked, prompt, following)
    rows = []
    for quantize in arguments.quantize:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            write_onnx(baked, Path(folder), quantize=quantize)
            for native in (False, True):
                session = Session(Path(folder), threads=torch.get_num_threads(), native=native)
                setting = {"quantize": quantize, "native": native}
                for asked, tokens in zip(prompts, expected, strict=True):
                    rows.append(_compare(baked, session, asked, tokens) | setting)
                    print(rows[-1], flush=True)
                rows.append(_perplexity(baked, session, prompt, following, full) | setting)
                print(rows[-1], flush=True)
    for found in _gguf(baked, tokenizer, prompts, arguments):
        rows.append(found)
        print(rows[-1], flush=True)
    if arguments.out:
        save(arguments.out, {"rows": rows})


def _torch(baked: Baked, prompt: list[int], new: int) -> list[int]:
    return greedy_tokens(baked.model, prompt, new, slots_of(baked.block), baked.block.layers, set())


def _compare(baked: Baked, session: Session, prompt: list[int], expected: list[int]) -> dict[str, Any]:
    """Greedy tokens on their own, and predictions when fed the expected ones."""
    slots = slots_of(baked.block)
    length = len(prompt) + len(expected)
    conversation = session.start(length, slots)
    found = list(conversation.greedy(prompt, len(expected), set()))
    fed, following, hits = session.start(length, slots), prompt, 0
    for token in expected:
        hits += int(fed.feed(following).argmax()) == token
        following = [token]
    equal = next((i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]), len(expected))
    return {
        "prompt_tokens": len(prompt),
        "compared": len(expected),
        "equal_until": equal,
        "agreement": round(hits / len(expected), 4),
        "cache_bytes": conversation.bytes,
    }


def _perplexity(baked: Baked, session: Session, prompt: list[int], following: list[int], full: float) -> dict[str, Any]:
    """Of the tokens that follow a prompt: the bundle's, and with it PyTorch's with the full cache."""
    conversation = session.start(len(prompt) + len(following), slots_of(baked.block))
    steps = [prompt, *([token] for token in following[:-1])]
    exported = torch.from_numpy(np.stack([conversation.feed(step) for step in steps]))
    return {
        "perplexity": _predicted(exported, following),
        "perplexity_full_cache_float32": full,
        "scored": len(following),
        "prompt_tokens": len(prompt),
    }


@torch.inference_mode()
def _full_cache_perplexity(baked: Baked, prompt: list[int], following: list[int]) -> float:
    """Of the same tokens in PyTorch."""
    ids = torch.tensor([prompt + following])
    logits = baked.model(ids, use_cache=False, logits_to_keep=len(following) + 1).logits
    return _predicted(logits[0, :-1], following)


def _predicted(logits: torch.Tensor, tokens: list[int]) -> float:
    """Perplexity of tokens that logits, [tokens, V], predict."""
    return round(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(tokens)).exp().item(), 3)


def _gguf(
    baked: Baked, tokenizer: Any, prompts: list[list[int]], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Greedy text of stock llama.cpp, full cache, beside the dense PyTorch model's. The model's weights are rounded."""
    for parameter in baked.model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        write_gguf(baked, Path(folder) / "model.gguf")
        context = max(map(len, prompts)) + arguments.new
        runtime = LlamaCpp(Path(folder) / "model.gguf", context=context, threads=torch.get_num_threads())
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = baked.model.generate(ids, max_new_tokens=arguments.new, do_sample=False)[0, len(prompt) :]
            expected, found = tokenizer.decode(out, skip_special_tokens=True), runtime.text(prompt, arguments.new)
            yield {
                "prompt_tokens": len(prompt),
                "compared": len(out),
                "equal_text": found == expected,
                "equal_characters": sum(
                    1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, expected, strict=False))
                ),
                "characters": len(expected),
                "quantize": "gguf f16",
            }


def text_ids(tokenizer: Any) -> list[int]:
    """The built-in prompts and the demo's text."""
    ids: list[int] = tokenizer("\n\n".join([*builtin_prompts(), TEXT.read_text(encoding="utf-8")])).input_ids
    return ids


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", choices=tuple(SCORES.values()), default="retrieval-kv")
    parser.add_argument("--profile", type=Path, help="head profile; without it one is calibrated")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--prompts", type=numbers, default=[500, 1200, 2500, 4500, 6000], help="lengths in tokens")
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--before", type=int, default=2500, help="tokens of text before those that are scored")
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--quantize", type=lambda text: text.split(","), default=["none", "int8", "int4"])
    parser.add_argument("--scratch", type=Path, help="folder for the bundles")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a look: one prompt, float32 and GGUF")
    arguments = parser.parse_args()
    vars(arguments).update(QUICK if arguments.quick else {})
    return arguments


if __name__ == "__main__":
    main()
