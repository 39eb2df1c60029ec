"""Run a bundle in plain ONNX Runtime, without PyTorch: caches stay in place, bound as input and output at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thinkkv.export.onnx.native import library_of
from thinkkv.export.onnx.slots import Slots, in_blocks
from thinkkv.patches.errors import ExportError, UnsupportedGenerationError
from thinkkv.sdk.extras import require

GRAPH_FILE = "model.onnx"


class Session:
    """One bundle, loaded.

    Args:
        folder: with ``model.onnx``; verified by the caller.
        threads: of ONNX Runtime; None leaves the choice to it.
        native: use operators in C instead of the graph's definitions: the bundle's own, or ones compiled here.

    Raises:
        ExportError: ONNX Runtime cannot load the graph or the operators, or they cannot be compiled here.
    """

    def __init__(self, folder: Path, *, threads: int | None = None, native: bool = False) -> None:
        require(("onnxruntime",), extra="export", purpose="running a bundle")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False  # as genai_config.json has it: see write.py
        if threads is not None:
            options.intra_op_num_threads = threads
        library = library_of(folder) if native else None
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            self._session = onnxruntime.InferenceSession(
                str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has one class per status, none of them public
            reason = str(error).splitlines()[0][:200]
            raise ExportError(f"ONNX Runtime cannot load {folder} ({reason}) - check its version") from error
        self._runtime = onnxruntime
        self._caches = [value for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]

    def start(self, max_length: int, slots: Slots | None) -> Conversation:
        """An empty conversation.

        Args:
            max_length: tokens that it may grow to.
            slots: of the bundle's bounded caches; None where it has none.
        """
        return Conversation(self._session, self._runtime, self._caches, max_length, slots)


def batch_refused(sequences: int, instead: str) -> UnsupportedGenerationError:
    """The error for a batch, with what to do instead."""
    return UnsupportedGenerationError(
        f"a bundle generates one sequence at a time, this is a batch of {sequences} - {instead}"
    )


class Conversation:
    """The caches of one sequence, and what was fed to them.

    Attributes:
        seen: tokens in the caches' past, evicted ones too.
    """

    def __init__(self, session: Any, runtime: Any, caches: Sequence[Any], max_length: int, slots: Slots | None) -> None:
        self._session, self._max_length, self._slots = session, max_length, slots
        self.seen = 0
        self._binding = session.io_binding()
        self._binding.bind_output("logits")
        self._buffers: list[tuple[Any, bool]] = []
        for value in caches:
            _, heads, length, dim = value.shape
            bounded = length == "slots"
            shape = (1, heads, min(slots.capacity, max_length) if bounded and slots else in_blocks(max_length), dim)
            dtype = np.float16 if value.type == "tensor(float16)" else np.float32
            # Zeros: a full cache is read beyond the tokens that it holds, with a weight of nothing.
            buffer = runtime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
            self._buffers.append((buffer, bounded))
            self._binding.bind_ortvalue_input(value.name, buffer)
            # The same memory as output: the graph writes the new token into it and copies nothing.
            self._binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), buffer)

    @property
    def bytes(self) -> dict[str, int]:
        """Cache bytes by name.

        ``full``: if every head kept every token; ``promised``: full heads all, the others as many as they have slots;
        ``planned`` and ``used``: what the keep rule has in use; ``physical``: allocated.
        """
        found = dict.fromkeys(("full", "promised", "planned", "used", "physical"), 0)
        for buffer, bounded in self._buffers:
            _, heads, length, dim = buffer.shape()
            row = heads * dim * (2 if buffer.data_type() == "tensor(float16)" else 4)
            slots = self._slots if bounded else None
            found["full"] += row * self.seen
            found["promised"] += row * (min(self.seen, slots.capacity) if slots else self.seen)
            found["used"] += row * (slots.in_use(self.seen) if slots else self.seen)
            found["physical"] += row * length
        return found | {"planned": found["used"]}

    def feed(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """Append tokens to the sequence.

        Args:
            ids: a prompt, a further turn, or one token.

        Returns:
            [vocabulary] float32: logits after the last of them, the caller's own.

        Raises:
            UnsupportedGenerationError: they are a batch.
            ExportError: they do not fit ``max_length``.
        """
        if len(ids) and np.ndim(ids[0]):
            raise batch_refused(len(ids), "give each its own")
        if self.seen + len(ids) > self._max_length:
            raise ExportError(
                f"{self.seen + len(ids)} tokens do not fit the conversation's {self._max_length} - shorten the prompt "
                "or lower --max-new-tokens"
            )
        self.seen += len(ids)
        inputs = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, self.seen), np.int64)}
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._session.run_with_iobinding(self._binding)
        logits = self._binding.get_outputs()[0].numpy()  # in the order in which they were bound
        return np.array(logits[0, -1], dtype=np.float32)  # a copy: the next step's logits take the same memory

    def greedy(self, ids: Sequence[int], new: int, stop: set[int]) -> Iterator[int]:
        """Feed a prompt and yield the most probable tokens one by one, the one that stops included.

        Args:
            ids: the prompt, or a further turn, which starts with the token yielded last: that one was not fed yet.
            new: tokens at most.
            stop: token ids that end the text.
        """
        following = list(ids)
        for _ in range(new):
            token = int(self.feed(following).argmax())
            yield token
            if token in stop:
                return
            following = [token]
