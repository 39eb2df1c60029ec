"""An exported bundle in plain ONNX Runtime, as one side of a speed comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinkkv.export.onnx.generate import settings_of
from thinkkv.export.onnx.session import Conversation, Session
from thinkkv.sdk.block import Block
from thinkkv.sdk.manifest import verify
from thinkkv.sdk.speed.contender import Contender, Held


class OnnxContender(Contender):
    """One bundle.

    Args:
        bundle: folder that ``thinkkv export --format onnx`` wrote; held against its manifest.
        name: of the policy in the rows, with its options.
        threads: of the runtime; None for its own choice.
        native: with operators in C.

    Raises:
        BundleError: the folder is no bundle that runs here.
        ExportError: operators in C cannot be had here.
    """

    def __init__(self, bundle: str, name: str, threads: int | None, native: bool) -> None:
        folder = Path(bundle)
        verify(folder)
        self.runtime = "onnx-native" if native else "onnx"
        block = Block.read(folder)
        self.policy, self.ratio = name, block.ratio or 1.0
        _, self._slots = settings_of(folder)
        self._session = Session(folder, threads=threads, native=native)
        self._conversation: Conversation | None = None
        self._token = 0

    def prefill(self, ids: Sequence[int], new_tokens: int) -> None:
        """Buffers for prompt and new tokens, then one run."""
        self._conversation = None
        self._conversation = self._session.start(len(ids) + new_tokens, self._slots)
        self._token = int(self._conversation.feed(ids).argmax())

    def step(self) -> None:
        """One run of one token."""
        assert self._conversation is not None
        self._token = int(self._conversation.feed([self._token]).argmax())

    def held(self) -> Held:
        """Of the bound buffers."""
        assert self._conversation is not None
        held = self._conversation.bytes
        return Held(held["physical"], held["used"], held["full"])


def of_job(job: Mapping[str, Any]) -> tuple[OnnxContender, list[int]]:
    """Contender and a prompt of any tokens for a process of its own, without PyTorch.

    Args:
        job: ``bundle, name, native, threads, context``.
    """
    contender = OnnxContender(job["bundle"], job["name"], job["threads"], job["native"])
    return contender, [1 + i % 50 for i in range(job["context"])]
