"""Perplexity of a text's continuation after its beginning was compressed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, ClassVar

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.evaluation.sample import Encoded, Sample
from thinkkv.sdk.evaluation.tasks.task import Metric, Task

CONTINUATION = 128
"""Tokens to predict; the loss of the first, which the compressed beginning already predicts, does not count."""


@dataclass(frozen=True)
class Perplexity(Task):
    """Passages of one text, evenly spread over it; they overlap where the text is short.

    Args:
        text: to read.
        name: of the task.
    """

    text: str
    name: str = "perplexity"
    metric: ClassVar[Metric] = "perplexity"
    _ids: dict[int, list[int]] = field(default_factory=dict, repr=False, compare=False)

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        """The passage that starts at the ``index``-th place of an even spread (van der Corput's, base 2).

        Raises:
            ThinkKVError: the text is shorter than one passage.
        """
        if id(tokenizer) not in self._ids:
            self._ids[id(tokenizer)] = tokenizer(self.text).input_ids
        ids = self._ids[id(tokenizer)]
        places = len(ids) - size
        if places <= 0:
            raise ThinkKVError(
                f"{self.name} has {len(ids)} tokens, a passage needs {size + 1} - give a longer text with "
                "perplexity:FILE, or smaller --contexts"
            )
        start = int(places * _spread(index + seed))
        passage = ids[start : start + size]
        split = size - CONTINUATION
        if split < 1:
            raise ThinkKVError(f"a passage of {size} tokens leaves none before its last {CONTINUATION} - ask for more")
        return Encoded(Sample("", "", ()), tuple(passage[:split]), tuple(passage[split:]))


def builtin_text() -> str:
    """The texts that ship with thinkkv: a chronicle, and the calibration prompts."""
    folder = files("thinkkv.sdk") / "prompts"
    lines = (folder / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    chronicle = (folder / "demo.txt").read_text(encoding="utf-8")
    return "\n\n".join([chronicle, *(json.loads(line)["prompt"] for line in lines)])


def _spread(index: int) -> float:
    """The ``index``-th point in [0, 1) of a sequence that fills it evenly at every length."""
    place, value = 0.5, 0.0
    while index:
        value += place * (index & 1)
        index, place = index >> 1, place / 2
    return value
