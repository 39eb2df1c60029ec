"""One runtime answers samples, or is timed; run it in the venv that ``build.sh`` makes for the runtime.

    python benchmarks/rivals/runtime.py genai scratch/stock answer --samples scratch/samples.jsonl --out answers.jsonl
    python benchmarks/rivals/runtime.py llama_cpp scratch/gguf/model.gguf speed --samples scratch/samples.jsonl

Needs nothing of thinkkv, but for ``thinkkv`` itself as a runtime. ``benchmarks/rival_runtimes.py`` calls it. Caches are
full but for ours. A killed run of ``answer`` goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Protocol

QUESTIONS = ("in-window", "after")
WARM_UP = 2
"""Decode steps that do not count."""


class Runtime(Protocol):
    """One loaded model."""

    package: str

    def answer(self, turns: Sequence[list[int]], new: int) -> list[int]:
        """Feed the turns one after the other to an empty cache, then generate greedily."""

    def speed(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        """Seconds until the first new token, and for each of ``new`` further ones."""

    def cache_bytes(self) -> int:
        """Allocated for keys and values of what ran last."""


class Transformers:
    """Stock transformers in float32."""

    package = "transformers"

    def __init__(self, checkpoint: Path, threads: int, _room: int) -> None:
        import torch  # each venv has one runtime

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = self.load(checkpoint)
        eos = self._model.generation_config.eos_token_id
        self._stop = {eos} if isinstance(eos, int) else set(eos or ())

    def load(self, checkpoint: Path) -> Any:
        """The model in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self._torch.float32).eval()

    def new_cache(self) -> Any:
        """An empty cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def answer(self, turns: Sequence[list[int]], new: int) -> list[int]:
        self._cache = self.new_cache()
        said = [[self._feed(turn) for turn in turns][-1]]
        while said[-1] not in self._stop and len(said) < new:
            said.append(self._feed(said[-1:]))
        return [token for token in said if token not in self._stop]

    def speed(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        self._cache = self.new_cache()
        token, first = self._timed(ids)
        steps = []
        for _ in range(new):
            token, seconds = self._timed([token])
            steps.append(seconds)
        return first, steps

    def cache_bytes(self) -> int:
        from tensor_bytes import tensor_bytes

        return sum(tensor_bytes(vars(layer)) for layer in self._cache.layers)

    def _timed(self, ids: list[int]) -> tuple[int, float]:
        start = time.perf_counter()
        return self._feed(ids), time.perf_counter() - start

    def _feed(self, ids: list[int]) -> int:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())


class TransformersQuantized(Transformers):
    """With its cache in four bits."""

    def new_cache(self) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache("quanto", self._model.config, nbits=4)


class ThinkKV(Transformers):
    """The same model, patched as it was exported."""

    package = "thinkkv"

    def load(self, checkpoint: Path) -> Any:
        from thinkkv import sdk

        model, _ = sdk.load(checkpoint, dtype="float32")
        self._handle = sdk.handle_of(model)
        return model

    def new_cache(self) -> Any:
        return self._handle.new_cache()

    def cache_bytes(self) -> int:
        return int(self._handle.report(self._cache).bytes.physical)


class Genai:
    """onnxruntime-genai: its own stock export, or ours."""

    package = "onnxruntime-genai"

    def __init__(self, bundle: Path, threads: int, room: int) -> None:
        import onnxruntime_genai  # each venv has one runtime

        config = onnxruntime_genai.Config(str(bundle))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._genai, self._model, self._room = onnxruntime_genai, onnxruntime_genai.Model(config), room
        decoder = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]
        bounded = decoder.get("sliding_window", {}).get("layers")
        self._caches = max(bounded) + 1 if bounded else decoder["num_hidden_layers"]

    def answer(self, turns: Sequence[list[int]], new: int) -> list[int]:
        self._start(sum(map(len, turns)) + new)
        for turn in turns:
            self._append(turn)
        said: list[int] = []
        while len(said) < new and not self._generator.is_done():
            said.append(self._next())
        return said[: -1 if self._generator.is_done() and len(said) < new else None]

    def speed(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        # No end token is chosen before this length: then all steps are made.
        self._start(len(ids) + self._room, min_length=len(ids) + self._room)
        start = time.perf_counter()
        self._append(ids)
        self._next()
        first, steps = time.perf_counter() - start, []
        for _ in range(new):
            start = time.perf_counter()
            self._next()
            steps.append(time.perf_counter() - start)
        return first, steps

    def cache_bytes(self) -> int:
        names = (f"present.{number}.{kind}" for number in range(self._caches) for kind in ("key", "value"))
        return sum(self._generator.get_output(name).nbytes for name in names)

    def _start(self, length: int, **options: int) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, do_sample=False, **options)
        self._generator = self._genai.Generator(self._model, parameters)

    def _append(self, ids: list[int]) -> None:
        self._generator.append_tokens(ids)

    def _next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


class LlamaCpp:
    """llama.cpp through its own server, which counts its time itself."""

    package = "xllamacpp"
    cache_type = "GGML_TYPE_F16"

    def __init__(self, file: Path, threads: int, room: int) -> None:
        import xllamacpp  # each venv has one runtime

        self._options = xllamacpp.CommonParams()
        self._options.cache_type_k = self._options.cache_type_v = getattr(xllamacpp.ggml_type, self.cache_type)
        self._options.model.path = str(file)
        self._options.n_parallel, self._options.warmup, self._options.verbosity = 1, False, -1
        self._options.cpuparams.n_threads = self._options.cpuparams_batch.n_threads = threads
        self._runtime, self._room, self._server = xllamacpp, room, None

    def answer(self, turns: Sequence[list[int]], new: int) -> list[int]:
        ids = [token for turn in turns for token in turn]
        done = self._complete(ids, new, return_tokens=True, verbose=True)
        tokens: list[int] = done["__verbose"]["tokens"]
        return tokens if done["choices"][0]["finish_reason"] == "length" else tokens[:-1]

    def speed(self, ids: list[int], new: int) -> tuple[float, list[float]]:
        timings = self._complete(ids, new + 1, ignore_eos=True)["timings"]
        return timings["prompt_ms"] / 1000, [timings["predicted_per_token_ms"] / 1000] * new

    def cache_bytes(self) -> int:
        return 0  # it does not say; rival_runtimes.py counts what the geometry needs

    def _complete(self, ids: list[int], new: int, **options: Any) -> dict[str, Any]:
        if self._server is None:
            self._options.n_ctx = len(ids) + max(new, self._room) + 512
            self._server = self._runtime.Server(self._options)
        request = {"prompt": ids, "max_tokens": new, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
        found: dict[str, Any] = self._server.handle_completions(request | options)
        return found


class LlamaCpp8(LlamaCpp):
    """With its cache in eight bits."""

    cache_type = "GGML_TYPE_Q8_0"


class LlamaCpp4(LlamaCpp):
    """With its cache in four bits."""

    cache_type = "GGML_TYPE_Q4_0"


RUNTIMES = {
    "transformers": Transformers,
    "transformers_quantized": TransformersQuantized,
    "thinkkv": ThinkKV,
    "genai": Genai,
    "llama_cpp": LlamaCpp,
    "llama_cpp_q8_0": LlamaCpp8,
    "llama_cpp_q4_0": LlamaCpp4,
}


def main() -> None:
    """Answer or be timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("model", type=Path, help="checkpoint, bundle or GGUF file")
    parser.add_argument("work", choices=("answer", "speed"))
    parser.add_argument("--samples", type=Path, required=True, help="what samples.py wrote")
    parser.add_argument("--after", action="store_true", help="then again, the question after the compression")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the timed prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=48, help="decode steps that are timed")
    parser.add_argument("--out", type=Path, help="of answers")
    options = parser.parse_args()
    runtime: Runtime = RUNTIMES[options.runtime](options.model, options.threads, options.new + WARM_UP + 1)
    samples = [json.loads(line) for line in options.samples.read_text().splitlines()]
    if options.work == "answer":
        answer(runtime, samples, QUESTIONS if options.after else QUESTIONS[:1], options.out)
    else:
        ids = [token for sample in samples for token in sample["context"]]
        ids = (ids * (options.context // len(ids) + 1))[: options.context]
        print(json.dumps(timed(runtime, ids, options.new) | {"version": version(runtime.package)}), flush=True)


def answer(runtime: Runtime, samples: Sequence[dict[str, Any]], questions: Sequence[str], out: Path) -> None:
    """Append the answers that are missing: of all samples, for each way of asking."""
    done = len(out.read_text().splitlines()) if out.exists() else 0
    with out.open("a") as file:
        for question, sample in list(product(questions, samples))[done:]:
            turns = [sample["context"], sample["question"]]
            said = runtime.answer(turns if question == "after" else [turns[0] + turns[1]], sample["new_tokens"])
            row = {"question": question, "said": said, "cache_bytes": runtime.cache_bytes()}
            file.write(json.dumps(row) + "\n")
            file.flush()


def timed(runtime: Runtime, ids: list[int], new: int) -> dict[str, Any]:
    """Speeds and bytes of one prompt."""
    first, steps = runtime.speed(ids, new + WARM_UP)
    peak = own_peak()  # first: asking for caches may copy them
    return {
        "prefill_seconds": first,
        "step_seconds": statistics.median(steps[WARM_UP:]),
        "peak_rss_bytes": peak,
        "cache_bytes": runtime.cache_bytes(),
    }


def own_peak() -> int:
    """Peak resident bytes of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
