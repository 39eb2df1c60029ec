"""Speed of an exported bundle beside the stock export, llama.cpp and PyTorch, in one run on one machine.

    python benchmarks/export_speed.py --threads 1,2 --out benchmarks/results/export_speed.json

Every measurement runs in a process of its own, so that peak memory is its own; the settings take turns, round by round.
Both ONNX bundles hold the same int4 weights, llama.cpp the same model at q4_0, PyTorch float32.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from environment import save

SETTINGS = ("ours-int4", "stock-int4", "llama.cpp-q4_0", "torch-ours", "torch-stock")
TEXT = Path(__file__).parent.parent / "sdk" / "prompts" / "demo.txt"
Measured = dict[str, float]


def main() -> None:
    """Prepare the files, measure in turns, write medians."""
    arguments = _arguments()
    if arguments.cell:
        setting, context = arguments.cell.split(":")
        print(json.dumps(_cell(setting, int(context), arguments.new, arguments.threads[0], arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        _prepare(arguments, folder)
        rows = []
        for threads in arguments.threads:
            for context in arguments.contexts:
                rows += _in_turns(arguments, folder, threads, context)
    if arguments.out:
        save(arguments.out, {"rows": rows})


def _in_turns(arguments: argparse.Namespace, folder: Path, threads: int, context: int) -> list[dict[str, Any]]:
    found: dict[str, list[Measured]] = {setting: [] for setting in arguments.settings}
    for _ in range(arguments.rounds):
        for setting, measured in found.items():
            measured.append(_in_a_process(setting, context, arguments.new, threads, folder))
    rows = []
    for setting, measured in found.items():
        medians = {name: statistics.median(each[name] for each in measured) for name in measured[0]}
        rows.append({"setting": setting, "threads": threads, "context": context, **medians})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _in_a_process(setting: str, context: int, new: int, threads: int, folder: Path) -> Measured:
    command = [sys.executable, __file__, "--cell", f"{setting}:{context}", "--new", str(new)]
    command += ["--threads", str(threads), "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{setting} at {context} failed:\n{done.stderr[-2000:]}")
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    return measured


def _prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Both ONNX bundles, the GGUF file and the checkpoint, all from one baked model; what is there is used."""
    if (folder / "ready").exists():
        return
    from thinkkv import sdk
    from thinkkv.export.bake import bake
    from thinkkv.export.gguf import write_gguf
    from thinkkv.export.onnx.write import write_onnx
    from thinkkv.export.safetensors import write_checkpoint
    from thinkkv.sdk.budget import Budget
    from thinkkv.sdk.policies import policy_named
    from thinkkv.sdk.profile import score_for

    model, tokenizer = sdk.load(arguments.model, dtype="float32")
    profile = sdk.calibrate(model, tokenizer, score=score_for(arguments.policy))
    budget, policy = Budget(ratio=arguments.ratio), policy_named(arguments.policy)
    baked = bake(model, tokenizer, policy=policy, budget=budget, profile=profile, label=arguments.model)
    for name in ("ours", "checkpoint", "stock"):
        (folder / name).mkdir(parents=True)
    write_onnx(baked, folder / "ours", quantize="int4")
    write_checkpoint(baked, folder / "checkpoint")
    write_gguf(baked, folder / "model.gguf", quantize="int4")
    # The stock export as its documentation has it: no option of ours.
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder / "checkpoint"]
    builder += ["-o", folder / "stock", "-p", "int4", "-e", "cpu", "-c", folder / "cache"]
    subprocess.run(builder, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    (folder / "ready").touch()


def _cell(setting: str, context: int, new: int, threads: int, folder: Path) -> Measured:
    """One prefill and ``new`` decoded tokens."""
    measures: dict[str, Callable[..., Measured]] = {
        "ours-int4": lambda *a: _genai(folder / "ours", *a),
        "stock-int4": lambda *a: _genai(folder / "stock", *a),
        "llama.cpp-q4_0": lambda *a: _llama_cpp(folder / "model.gguf", *a),
        "torch-ours": lambda *a: _torch(folder / "checkpoint", True, *a),
        "torch-stock": lambda *a: _torch(folder / "checkpoint", False, *a),
    }
    measured = measures[setting](_ids(folder, context), new, threads)
    return measured | {"peak_rss_bytes": _peak_rss()}


def _peak_rss() -> int:
    """Of this process; Linux' own count, as that of getrusage is inherited from the parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _ids(folder: Path, context: int) -> list[int]:
    from tokenizers import Tokenizer

    text = TEXT.read_text(encoding="utf-8")
    ids: list[int] = Tokenizer.from_file(str(folder / "ours" / "tokenizer.json")).encode(text).ids
    return (ids * (context // len(ids) + 1))[:context]


def _genai(bundle: Path, ids: list[int], new: int, threads: int) -> Measured:
    import onnxruntime_genai as genai

    config = genai.Config(str(bundle))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + new + 1, do_sample=False)
    generator = genai.Generator(model, parameters)
    start = time.perf_counter()
    generator.append_tokens(np.array(ids, dtype=np.int32))
    generator.generate_next_token()
    prefill, steps = time.perf_counter() - start, []
    for _ in range(new):
        start = time.perf_counter()
        generator.generate_next_token()
        steps.append(time.perf_counter() - start)
    numbers = range(len(_cache_names(bundle)) // 2)
    caches = [generator.get_output(f"present.{number}.{kind}") for number in numbers for kind in ("key", "value")]
    return _measured(len(ids), prefill, steps, sum(cache.nbytes for cache in caches))


def _cache_names(bundle: Path) -> list[str]:
    import onnx

    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    return [value.name for value in graph.input if value.name.startswith("past_key_values.")]


def _llama_cpp(path: Path, ids: list[int], new: int, threads: int) -> Measured:
    from gguf import GGUFReader

    from thinkkv.export.llama_cpp import LlamaCpp

    fields = GGUFReader(path).fields
    layers, heads, dim = (
        int(fields[f"llama.{name}"].contents())
        for name in ("block_count", "attention.head_count_kv", "attention.key_length")
    )
    runtime = LlamaCpp(path, context=len(ids) + new + 8, threads=threads, cache="f16")
    timings = runtime.complete(ids, new, ignore_end=True)["timings"]
    return {
        "prefill_tokens_per_second": timings["prompt_per_second"],
        "decode_tokens_per_second": timings["predicted_per_second"],
        "cache_bytes": 2 * 2 * layers * heads * dim * (len(ids) + new),
    }


def _torch(folder: Path, patched: bool, ids: list[int], new: int, threads: int) -> Measured:
    import torch

    from thinkkv import sdk
    from thinkkv.sdk import models

    torch.set_num_threads(threads)
    model, _ = sdk.load(folder) if patched else models.load(folder)
    cache = sdk.handle_of(model).new_cache() if patched else None
    steps, step = [], torch.tensor([ids])
    with torch.inference_mode():
        for _ in range(new + 1):
            start = time.perf_counter()
            out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            steps.append(time.perf_counter() - start)
    if patched:
        used = sdk.handle_of(model).report(cache).bytes.used
    else:
        used = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return _measured(len(ids), steps[0], steps[1:], used)


def _measured(prompt: int, prefill: float, steps: list[float], cache_bytes: int) -> Measured:
    return {
        "prefill_tokens_per_second": round(prompt / prefill, 1),
        "decode_tokens_per_second": round(1 / statistics.median(steps), 2),
        "cache_bytes": cache_bytes,
    }


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", choices=("task-kv", "retrieval-kv"), default="retrieval-kv")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--contexts", type=numbers, default=[128, 600, 2048, 7900])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--settings", type=lambda text: text.split(","), default=list(SETTINGS))
    parser.add_argument("--new", type=int, default=64, help="tokens decoded")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the exported files are kept for the next run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
