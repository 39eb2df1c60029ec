"""Runtimes in venvs of their own beside ours: the same weights, samples and prompts, in turns.

    python benchmarks/rival_runtimes.py --folder scratch --out benchmarks/results/rivals_runtimes.json
    python benchmarks/rival_runtimes.py --folder scratch --quick --here   # a look, below 3 minutes

Builds what is missing in FOLDER: a venv per rival (``rivals/build.sh``; with ``--here`` this environment serves), the
checkpoint, the stock builder's int4 export, ours at the ratio of each prompt length, and a GGUF file. Every setting
answers all samples; then each reads and continues one prompt in a process of its own, in turns, ``--rounds`` times;
medians are reported. What FOLDER holds is not measured again: an interrupted run goes on. Full caches do not care when
a question comes, so only ours answer twice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answers import RETRIEVAL
from environment import save
from export_speed import build_stock
from transformers import AutoConfig, AutoTokenizer

from thinkkv.sdk.cli import main as thinkkv
from thinkkv.sdk.evaluation.scoring import share_found

RIVALS = Path(__file__).with_name("rivals")
QUICK = {
    "contexts": [600],
    "rounds": 1,
    "new": 8,
    "threads": 1,
    "samples": 1,
    "tasks": "niah-single",
    "context": 600,
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A runtime with a model.

    Args:
        name: in the rows.
        runtime: in ``runtime.py``.
        venv: of the rival; None for this one.
        model: below the folder.
        weights: their format.
        compressed: the cache is ours.
        sized: its bounded heads have a fixed size, and so there is a model for each prompt length.
        bits: of a number in its cache with its share of a scale; where the runtime does not say what it holds.
        here: whether it needs nothing that this environment lacks.
    """

    name: str
    runtime: str
    venv: str | None
    model: str
    weights: str
    compressed: bool = False
    sized: bool = False
    bits: float = 16
    here: bool = True

    def folder(self, context: int) -> str:
        """Of the model for prompts of this length."""
        return f"{self.model}-{context}" if self.sized else self.model


SETTINGS = (
    Setting("transformers", "transformers", "transformers", "checkpoint", "float32"),
    Setting(
        "transformers, cache in 4 bits", "transformers_quantized", "transformers", "checkpoint", "float32", here=False
    ),
    Setting("thinkkv on transformers", "thinkkv", None, "ours-checkpoint", "float32", compressed=True),
    Setting("llama.cpp", "llama_cpp", "llama_cpp", "gguf/model.gguf", "q4_0"),
    Setting("llama.cpp, cache in q8_0", "llama_cpp_q8_0", "llama_cpp", "gguf/model.gguf", "q4_0", bits=8.5),
    Setting("llama.cpp, cache in q4_0", "llama_cpp_q4_0", "llama_cpp", "gguf/model.gguf", "q4_0", bits=4.5),
    Setting("onnxruntime-genai, its export", "genai", "onnxruntime_genai", "stock", "int4"),
    Setting("onnxruntime-genai, our export", "genai", "onnxruntime_genai", "ours", "int4", compressed=True, sized=True),
)


def main() -> None:
    """Build, answer, time, write."""
    options = _options()
    _prepare(options)
    answers = [row for setting in _settings(options) for row in _answers(options, setting)]
    for row in answers:
        print(json.dumps(row), flush=True)
    speeds = list(_speeds(options))
    for row in speeds:
        print(json.dumps(row), flush=True)
    if options.out:
        save(options.out, {"ratio": options.ratio, "answers": answers, "rows": speeds})


def _prepare(options: argparse.Namespace) -> None:
    """Venvs, samples and models."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for venv in dict.fromkeys(setting.venv for setting in _settings(options) if setting.venv and not options.here):
        if not (folder / venv / "ready").exists():
            subprocess.run(["sh", RIVALS / "build.sh", venv, folder / venv], check=True)
            (folder / venv / "ready").touch()
    if not (folder / "samples.jsonl").exists():
        shape = ["--context", options.context, "--samples", options.samples, "--tasks", options.tasks]
        command = [sys.executable, RIVALS / "samples.py", "--model", options.model, *shape, "--out", folder]
        subprocess.run(list(map(str, command)), check=True)
    if not (folder / "stock").exists():
        build_stock(folder / "checkpoint", folder / "stock")
    compressed = ["--policy", "retrieval-kv", "--profile", options.profile, "--ratio", options.ratio]
    for context in dict.fromkeys([options.context, *options.contexts]):
        _export(options, f"ours-{context}", "onnx", "--quantize", "int4", "--context", context, *compressed)
    _export(options, "ours-checkpoint", "safetensors", *compressed)
    _export(options, "gguf", "gguf", "--quantize", "int4", "--policy", "full")


def _export(options: argparse.Namespace, name: str, format_: str, *more: object) -> None:
    if not (options.folder / name).exists():
        call = ["export", "--model", options.model, "--format", format_, "--no-verify", *more]
        thinkkv([str(part) for part in [*call, "--out", options.folder / name]], standalone_mode=False)


def _answers(options: argparse.Namespace, setting: Setting) -> Iterator[Row]:
    """Scores of one setting, a row for each task and way of asking."""
    samples = [json.loads(line) for line in (options.folder / "samples.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "checkpoint")
    out = options.folder / f"answers-{SETTINGS.index(setting)}.jsonl"
    _run(options, setting, options.context, "answer", *(["--after"] if setting.compressed else []), "--out", out)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    for question in dict.fromkeys(row["question"] for row in answers):
        found = [row for row in answers if row["question"] == question]
        for task in dict.fromkeys(sample["task"] for sample in samples):
            scores = [
                share_found(sample["answers"], tokenizer.decode(row["said"], skip_special_tokens=True))
                for sample, row in zip(samples, found, strict=True)
                if sample["task"] == task
            ]
            row = {"setting": setting.name, "weights": setting.weights, "task": task, "question": question}
            yield row | {"samples": len(scores), "score": round(statistics.mean(scores), 4)}


def _speeds(options: argparse.Namespace) -> Iterator[Row]:
    """Medians over the rounds, a row for each setting and context."""
    measured = options.folder / "speed.jsonl"
    done = [json.loads(line) for line in measured.read_text().splitlines()] if measured.exists() else []
    for context in options.contexts:
        for number in range(options.rounds):
            for setting in _settings(options):
                key = {"setting": setting.name, "threads": options.threads, "context": context, "round": number}
                if any(key.items() <= row.items() for row in done):
                    continue
                said = _run(options, setting, context, "speed", "--context", context, "--new", options.new)
                done.append(key | json.loads(said.splitlines()[-1]))
                with measured.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
        for setting in _settings(options):
            key = {"setting": setting.name, "threads": options.threads, "context": context}
            rows = [row for row in done if key.items() <= row.items()][: options.rounds]
            yield key | {"weights": setting.weights, "version": rows[0]["version"]} | _median(options, setting, rows)


def _settings(options: argparse.Namespace) -> list[Setting]:
    return [setting for setting in SETTINGS if setting.here or not options.here]


def _median(options: argparse.Namespace, setting: Setting, rows: Sequence[Row]) -> Row:
    context = rows[0]["context"]
    found = {name: statistics.median(row[name] for row in rows) for name in ("prefill_seconds", "step_seconds")}
    return {
        "prefill_tokens_per_second": round(context / found["prefill_seconds"], 1),
        "decode_tokens_per_second": round(1 / found["step_seconds"], 2),
        "cache_bytes": rows[0]["cache_bytes"] or _needed_bytes(options, setting, context),
        "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows),
        "rounds": len(rows),
    }


def _needed_bytes(options: argparse.Namespace, setting: Setting, tokens: int) -> int:
    """Of a full cache."""
    config = AutoConfig.from_pretrained(options.folder / "checkpoint")
    return int(setting.bits / 8 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens)


def _run(options: argparse.Namespace, setting: Setting, context: int, *work: object) -> str:
    """Standard output of ``runtime.py`` in the setting's venv."""
    venv = None if options.here else setting.venv
    python = options.folder / venv / "bin" / "python" if venv else Path(sys.executable)
    command = [python, RIVALS / "runtime.py", setting.runtime, options.folder / setting.folder(context), *work]
    command += ["--samples", options.folder / "samples.jsonl", "--threads", options.threads]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{setting.name} failed: {done.stderr[-500:]}")
    return done.stdout


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--profile", type=Path, default=RETRIEVAL, help="head profile of retrieval-kv")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--tasks", default="niah-single,passkey")
    parser.add_argument("--context", type=int, default=2000, help="tokens of a sample")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--contexts", type=lambda text: [int(part) for part in text.split(",")], default=[2048, 7900])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=48, help="decode steps that are timed")
    parser.add_argument("--quick", action="store_true", help="a look: one short prompt, one sample, one thread")
    parser.add_argument("--here", action="store_true", help="no venvs: the runtimes that are installed here")
    parser.add_argument("--folder", type=Path, required=True, help="where venvs, models and measurements are kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    vars(options).update(QUICK if options.quick else {})
    return options


if __name__ == "__main__":
    main()
