"""Speed of an exported bundle beside the stock export, llama.cpp and PyTorch, in one run on one machine.

    python benchmarks/export_speed.py --folder speed --profile benchmarks/results/eval_2000/retrieval-profile \
           --out benchmarks/results/export_speed.json
    python benchmarks/export_speed.py --folder scratch --quick         # a look, below 3 minutes

All settings of one context stand ready at once, each in a process of its own, so that peak memory is its own. They
prefill in turn and then decode in turn, a few tokens at a time, so that a machine that slows down slows all of them.
A process whose turn it is not is stopped: the threads of an idle runtime spin, and take half of the others' speed.
What was measured stands in FOLDER/measured.jsonl and is not measured again: an interrupted run goes on.

The ONNX bundles hold the same int4 weights: ours, by its definitions, with operators in C, and with float16 caches
besides, the stock export as its documentation has it, and the stock export with the builder options that ours has.
llama.cpp holds the same model at q4_0, PyTorch in float32. Contexts that the model does not have are measured on
random weights of its shape; ONNX Runtime's cache is filled without a prompt there, llama.cpp and PyTorch read one,
which takes a quarter of an hour at 32,000 tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from answers import RETRIEVAL
from environment import save
from export_runtimes import BUNDLES

from thinkkv.export.onnx.options import EXTRA_OPTIONS
from thinkkv.export.onnx.slots import in_blocks

SETTINGS = (*BUNDLES, "llama.cpp-q4_0", "torch-ours", "torch-stock")
GOALS = {128: 0.95, 600: 0.95, 2048: 1.2, 7900: 2.4}
"""Decode speed as a multiple of the stock export's, by context."""
QUICK = {"contexts": [128], "threads": [1], "rounds": 1, "new": 4, "profile": RETRIEVAL}
Row = dict[str, Any]


class Worker:
    """A setting in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, setting: str, threads: int, context: int) -> None:
        script = Path(__file__).with_name("export_runtimes.py")
        room = in_blocks(context + arguments.rounds * arguments.new + 2) - context
        command = [sys.executable, script, folder, setting, "--threads", threads, "--context", context, "--room", room]
        command += ["--filled"] if context >= arguments.filled else []
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.setting = setting

    def answer(self) -> Any:
        """The next line that is JSON; runtimes print other things, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise SystemExit(f"{self.setting} failed; run benchmarks/export_runtimes.py for it to see why")

    def ask(self, request: str) -> Any:
        """The answer to a request; the process runs no longer than that."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        answer = self.answer()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        """Let the process go."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Prepare the files, measure what is missing, write rows and goals."""
    arguments = _arguments()
    _prepare(arguments)
    measured = arguments.folder / "measured.jsonl"
    done = [json.loads(line) for line in measured.read_text().splitlines()] if measured.exists() else []
    for threads in arguments.threads:
        for context in arguments.contexts:
            if not any((row["threads"], row["context"]) == (threads, context) for row in done):
                rows = _measure(arguments, threads, context)
                done += rows
                with measured.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
    goals = [_goal(row, done) for row in done if row["setting"].startswith("ours")]
    for goal in goals:
        print(json.dumps(goal))
    if arguments.out:
        rows = [{name: value for name, value in row.items() if name != "chunks"} for row in done]
        runtimes = {name: version(name) for name in ("onnxruntime", "onnxruntime-genai", "xllamacpp")}
        save(arguments.out, {"runtimes": runtimes, "rows": rows, "ours_against_others": goals})


def _measure(arguments: argparse.Namespace, threads: int, context: int) -> list[Row]:
    """All settings at one context, in turns."""
    filled = context >= arguments.filled
    folder = arguments.folder / "long" if filled else arguments.folder
    settings = arguments.settings
    workers = [Worker(arguments, folder, setting, threads, context) for setting in settings]
    for worker in workers:
        worker.answer()
    prefills: dict[str, list[float]] = {setting: [] for setting in settings}
    for _ in range(max(1, min(arguments.rounds, arguments.prefill // context))):
        for worker in workers:
            prefills[worker.setting].append(worker.ask("prefill"))
    chunks: dict[str, list[float]] = {setting: [] for setting in settings}
    for _ in range(arguments.rounds):
        for worker in workers:
            chunks[worker.setting].append(statistics.median(worker.ask(f"decode {arguments.new}")))
    rows = []
    for worker in workers:
        prefill = statistics.median(prefills[worker.setting])
        speeds = {
            "prefill_tokens_per_second": None if math.isnan(prefill) else round(context / prefill, 1),
            "decode_tokens_per_second": round(1 / statistics.median(chunks[worker.setting]), 2),
        }
        key = {"setting": worker.setting, "threads": threads, "context": context}
        rows.append(key | speeds | worker.ask("memory") | {"chunks": chunks[worker.setting]})
        print(json.dumps({name: value for name, value in rows[-1].items() if name != "chunks"}), flush=True)
        worker.end()
    return rows


def _goal(ours: Row, rows: list[Row]) -> Row:
    """Our speeds and memory as multiples of the others'; decode speeds are compared turn by turn."""
    goal: Row = {name: ours[name] for name in ("setting", "threads", "context")}
    goal["wanted"] = GOALS.get(ours["context"])
    for other in rows:
        if other is ours or (other["threads"], other["context"]) != (ours["threads"], ours["context"]):
            continue
        turns = zip(ours["chunks"], other["chunks"], strict=True)
        prefill = "prefill_tokens_per_second"
        goal[other["setting"]] = {
            "decode": round(statistics.median(theirs / mine for mine, theirs in turns), 3),
            "prefill": round(ours[prefill] / other[prefill], 3) if ours[prefill] and other[prefill] else None,
            "peak_rss": round(ours["peak_rss_bytes"] / other["peak_rss_bytes"], 3),
            "cache": round(ours["cache_bytes"] / other["cache_bytes"], 3),
        }
    return goal


def _prepare(arguments: argparse.Namespace) -> None:
    """Bundles, GGUF file and checkpoint of the model and of one with random weights and a longer context."""
    from thinkkv import sdk
    from thinkkv.sdk.profile import fingerprint_of, score_for

    folder = arguments.folder
    if (folder / "ready").exists():
        return
    model, tokenizer = sdk.load(arguments.model, dtype="float32")
    score = score_for(arguments.policy)
    given = arguments.profile
    profile = sdk.HeadProfile.load(given) if given else sdk.calibrate(model, tokenizer, score=score)
    longest = max(arguments.contexts)
    if longest >= arguments.filled:
        config = copy.deepcopy(model.config)
        config.max_position_embeddings = longest + 1024
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
        random = type(model)(config).eval()
        _export(arguments, random, tokenizer, replace(profile, fingerprint=fingerprint_of(random)), longest)
    _export(arguments, model, tokenizer, profile, None)
    (folder / "ready").touch()


def _export(arguments: argparse.Namespace, model: Any, tokenizer: Any, profile: Any, context: int | None) -> None:
    from thinkkv.export.bake import bake
    from thinkkv.export.gguf import write_gguf
    from thinkkv.export.onnx.native import write_library
    from thinkkv.export.onnx.options import OnnxOptions
    from thinkkv.export.onnx.write import write_onnx
    from thinkkv.export.safetensors import write_checkpoint
    from thinkkv.sdk.budget import Budget
    from thinkkv.sdk.policies import policy_named

    budget, policy = Budget(ratio=arguments.ratio), policy_named(arguments.policy)
    baked = bake(
        model, tokenizer, policy=policy, budget=budget, profile=profile, context=context, label=arguments.model
    )
    folder = arguments.folder / "long" if context else arguments.folder
    for name in ("checkpoint", *set(BUNDLES.values())):
        (folder / name).mkdir(parents=True)
    write_checkpoint(baked, folder / "checkpoint")
    write_onnx(baked, folder / "ours", quantize="int4")
    write_library(folder / "ours")
    write_onnx(baked, folder / "ours-float16", quantize="int4", options=OnnxOptions(native=True, cache_dtype="float16"))
    write_gguf(baked, folder / "model.gguf", quantize="int4")
    build_stock(folder / "checkpoint", folder / "stock")
    build_stock(folder / "checkpoint", folder / "stock-same-options", *EXTRA_OPTIONS)


def build_stock(checkpoint: Path, target: Path, *options: str, precision: str = "int4") -> None:
    """The stock export as its documentation has it, or with these options of the builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(target)]
    command += ["-p", precision, "-e", "cpu", "-c", str(target / ".cache")]
    command += ["--extra_options", *options] if options else []
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def _arguments() -> argparse.Namespace:
    def split(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policy", choices=("task-kv", "retrieval-kv"), default="retrieval-kv")
    parser.add_argument("--profile", type=Path, help="head profile; without it one is calibrated")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--contexts", type=split(int), default=[128, 600, 2048, 7900, 32000])
    parser.add_argument("--filled", type=int, default=8193, help="from this context on, random weights")
    parser.add_argument("--threads", type=split(int), default=[2, 1])
    parser.add_argument("--settings", type=split(str), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=8, help="turns")
    parser.add_argument("--new", type=int, default=8, help="tokens decoded in a turn")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens prefilled in all, at least one prompt")
    parser.add_argument("--folder", type=Path, required=True, help="where exported files and measurements are kept")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a look: 128 tokens, one turn, one thread")
    arguments = parser.parse_args()
    vars(arguments).update(QUICK if arguments.quick else {})
    return arguments


if __name__ == "__main__":
    main()
