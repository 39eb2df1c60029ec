"""The runtimes that benchmarks/export_speed.py compares, behind one interface, each in a process of its own.

    python benchmarks/export_runtimes.py FOLDER SETTING --threads 2 --context 2048 --room 100

The process answers one JSON line for each line on its standard input: ``prefill``, ``decode N``, ``memory``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thinkkv.export.onnx.native import LIBRARY_FILE
from thinkkv.export.onnx.slots import GENAI_SLACK
from thinkkv.sdk.speed.peak import own_peak

TEXT = Path(__file__).parent.parent / "sdk" / "prompts" / "demo.txt"
BUNDLES = {
    "ours-int4": "ours",
    "ours-int4-native": "ours",
    "ours-int4-native-float16": "ours-float16",
    "stock-int4": "stock",
    "stock-int4-same-options": "stock-same-options",
}
"""Exported for ONNX Runtime: settings and their folders."""

NATIVE = ("ours-int4-native", "ours-int4-native-float16")
"""Settings with operators in C, which lie in the bundle's folder; the second has float16 caches."""


class Runtime(Protocol):
    """One loaded model."""

    def prefill(self) -> float:
        """Feed the prompt to an empty cache; seconds until the first new token."""

    def decode(self, new: int) -> list[float]:
        """Go on; seconds for each of ``new`` tokens."""

    def cache_bytes(self) -> int:
        """Of the cache as it is now."""


class Genai:
    """onnxruntime-genai."""

    def __init__(self, bundle: Path, ids: list[int], threads: int, room: int, native: bool) -> None:
        import onnxruntime_genai as genai  # each process loads its own runtime only

        config = genai.Config(str(bundle))
        options = {"intra_op_num_threads": threads} | ({"custom_ops_library": LIBRARY_FILE} if native else {})
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai, self._model = genai, genai.Model(config)
        self._ids, self._room = np.array(ids, dtype=np.int32), room
        decoder = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]
        bounded = decoder.get("sliding_window", {}).get("layers")
        self._caches = max(bounded) + 1 if bounded else decoder["num_hidden_layers"]

    def prefill(self) -> float:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(self._ids) + self._room, min_length=len(self._ids) + self._room)
        self._generator = self._genai.Generator(self._model, parameters)
        return _seconds(lambda: (self._generator.append_tokens(self._ids), self._generator.generate_next_token()))

    def decode(self, new: int) -> list[float]:
        return [_seconds(self._generator.generate_next_token) for _ in range(new)]

    def cache_bytes(self) -> int:
        names = (f"present.{number}.{kind}" for number in range(self._caches) for kind in ("key", "value"))
        return sum(self._generator.get_output(name).nbytes for name in names)


class FilledOnnx:
    """Plain ONNX Runtime with a cache that is said to hold ``context`` tokens; there is nothing to prefill."""

    def __init__(self, bundle: Path, context: int, threads: int, room: int, native: bool) -> None:
        import onnxruntime  # each process loads its own runtime only

        options = onnxruntime.SessionOptions()
        if native:
            options.register_custom_ops_library(str(bundle / LIBRARY_FILE))
        config = json.loads((bundle / "genai_config.json").read_text())["model"]["decoder"]
        for name in ("enable_mem_pattern", "enable_cpu_mem_arena"):
            setattr(options, name, config["session_options"].get(name, True))
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), options)
        self._binding, self._seen, self._caches = self._session.io_binding(), context, []
        self._binding.bind_output("logits")
        slots = config.get("sliding_window", {}).get("window_size", 0) + GENAI_SLACK
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values."):
                _, heads, length, _ = value.shape
                shape = (1, heads, slots if length == "slots" else context + room, config["head_size"])
                dtype = np.float16 if value.type == "tensor(float16)" else np.float32
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.full(shape, 0.01, dtype))
                self._binding.bind_ortvalue_input(value.name, cache)
                self._binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)
                self._caches.append(np.dtype(dtype).itemsize * int(np.prod(shape)))

    def prefill(self) -> float:
        return float("nan")

    def decode(self, new: int) -> list[float]:
        return [_seconds(self._step) for _ in range(new)]

    def cache_bytes(self) -> int:
        return sum(self._caches)

    def _step(self) -> None:
        self._seen += 1
        self._binding.bind_cpu_input("input_ids", np.full((1, 1), 500, np.int64))
        self._binding.bind_cpu_input("attention_mask", np.ones((1, self._seen), np.int64))
        self._session.run_with_iobinding(self._binding)
        self._binding.get_outputs()[0].numpy()


class LlamaCppServer:
    """llama.cpp, through its own server: it counts its time itself."""

    def __init__(self, path: Path, ids: list[int], threads: int, room: int) -> None:
        from gguf import GGUFReader  # each process loads its own runtime only

        from thinkkv.export.llama_cpp import LlamaCpp

        fields = GGUFReader(path).fields
        names = ("block_count", "attention.head_count_kv", "attention.key_length")
        layers, heads, dim = (int(fields[f"llama.{name}"].contents()) for name in names)
        self._token_bytes = 2 * 2 * layers * heads * dim
        self._runtime = LlamaCpp(path, context=len(ids) + room, threads=threads, cache="f16")
        self._ids, self._tokens = ids, 0

    def prefill(self) -> float:
        self._tokens = len(self._ids)
        return float(self._runtime.complete(self._ids, 1)["timings"]["prompt_ms"]) / 1000

    def decode(self, new: int) -> list[float]:
        # The same prompt again: all of it but its last token is still cached.
        timings = self._runtime.complete(self._ids, new, ignore_end=True, reuse_cache=True)["timings"]
        return [timings["predicted_per_token_ms"] / 1000] * new

    def cache_bytes(self) -> int:
        return self._token_bytes * self._tokens


class Torch:
    """PyTorch in float32, patched or as transformers has it."""

    def __init__(self, folder: Path, ids: list[int], threads: int, patched: bool) -> None:
        import torch  # each process loads its own runtime only

        from thinkkv import sdk
        from thinkkv.sdk import models

        torch.set_num_threads(threads)
        self._model, _ = sdk.load(folder) if patched else models.load(folder)
        self._handle = sdk.handle_of(self._model) if patched else None
        self._torch, self._ids = torch, torch.tensor([ids])

    def prefill(self) -> float:
        self._cache, self._step = self._handle.new_cache() if self._handle else None, self._ids
        return _seconds(self._forward)

    def decode(self, new: int) -> list[float]:
        return [_seconds(self._forward) for _ in range(new)]

    def cache_bytes(self) -> int:
        if self._handle:
            return int(self._handle.report(self._cache).bytes.used)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def _forward(self) -> None:
        with self._torch.inference_mode():
            out = self._model(self._step, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._step = out.past_key_values, out.logits[:, -1:].argmax(-1)


def main() -> None:
    """Load, then answer requests until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("setting")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--room", type=int, required=True, help="tokens that may follow the prompt")
    parser.add_argument(
        "--filled", action="store_true", help="no prompt for ONNX Runtime: a cache that is said to be full"
    )
    arguments = parser.parse_args()
    runtime = _load(arguments)
    for answer in (_answer(runtime, line.split()) for line in _requests()):
        print(json.dumps(answer), flush=True)


def _requests() -> Iterator[str]:
    print(json.dumps("ready"), flush=True)
    yield from iter(sys.stdin.readline, "")


def _answer(runtime: Runtime, request: list[str]) -> Any:
    if request[0] == "prefill":
        return runtime.prefill()
    if request[0] == "decode":
        return runtime.decode(int(request[1]))
    peak = own_peak()  # first: asking for caches may copy them
    return {"peak_rss_bytes": peak, "cache_bytes": runtime.cache_bytes()}


def _load(arguments: argparse.Namespace) -> Runtime:
    folder, setting, threads, room = arguments.folder, arguments.setting, arguments.threads, arguments.room
    if arguments.filled and setting in BUNDLES:
        return FilledOnnx(folder / BUNDLES[setting], arguments.context, threads, room, setting in NATIVE)
    ids = _ids(folder, arguments.context)
    if setting in BUNDLES:
        return Genai(folder / BUNDLES[setting], ids, threads, room, setting in NATIVE)
    if setting == "llama.cpp-q4_0":
        return LlamaCppServer(folder / "model.gguf", ids, threads, room)
    return Torch(folder / "checkpoint", ids, threads, patched=setting == "torch-ours")


def _ids(folder: Path, context: int) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "ours" / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids
    return (ids * (context // len(ids) + 1))[:context]


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
