"""An exported bundle in plain ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thinkkv.export.block import Block
from thinkkv.export.bundle import verify
from thinkkv.export.onnx.generate import settings_of
from thinkkv.export.onnx.session import Conversation, Session
from thinkkv.sdk.speed.contender import Contender, Held


class OnnxContender(Contender):
    """One bundle.

    Args:
        folder: what ``thinkkv export --format onnx`` wrote; held against its manifest.
        threads: of the runtime; None for its own choice.

    Raises:
        BundleError: the folder is no bundle that runs here.
    """

    runtime = "onnx"

    def __init__(self, folder: Path, threads: int | None) -> None:
        verify(folder)
        block = Block.read(folder)
        self.policy, self.ratio = block.policy, block.ratio or 1.0
        _, self._slots = settings_of(folder)
        self._session = Session(folder, threads=threads)
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
        return Held(**self._conversation.bytes)
