"""Questions of the user's own: JSON lines with ``context``, ``question`` and ``answer``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.evaluation.sample import Encoded, Sample, encode
from thinkkv.sdk.evaluation.tasks.task import Task


@dataclass(frozen=True)
class OwnData(Task):
    """Samples of a file, in its order; they have the length that they have.

    Args:
        name: of the task.
        samples: of the file.
    """

    name: str
    samples: tuple[Sample, ...]

    def sizes(self, tokenizer: Any, asked: Sequence[int]) -> list[int]:
        """The longest sample, whatever was asked."""
        return [max(encode(tokenizer, sample).tokens for sample in self.samples)]

    def count(self, asked: int) -> int:
        """At most what the file has."""
        return min(asked, len(self.samples))

    def text_of(self, index: int) -> int:
        """The first line with the same context."""
        return self._first[self.samples[index].context]

    @cached_property
    def _first(self) -> dict[str, int]:
        return {sample.context: index for index, sample in reversed(list(enumerate(self.samples)))}

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        """Line ``index``."""
        return encode(tokenizer, self.samples[index])


def read_samples(path: Path, text: str) -> OwnData:
    """The task of a file.

    Args:
        path: names it.
        text: its content. ``answer`` is a text, or a list of texts that all must come up; ``answer_prefix`` may begin
            the answer for the model.

    Raises:
        ThinkKVError: a line is not as it must be.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ThinkKVError(f"{path} holds no sample - give JSON lines with context, question and answer")
    return OwnData(f"data:{path.name}", tuple(_sample(path, number, line) for number, line in lines))


def _sample(path: Path, number: int, line: str) -> Sample:
    try:
        row = json.loads(line)
        given = row["answer"]
        answers = [str(answer) for answer in (given if isinstance(given, list) else [given])]
        context, question, prefix = str(row["context"]), str(row["question"]), str(row.get("answer_prefix", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        answers, context, question, prefix = [], "", "", ""
    if not context.strip() or not question.strip() or not answers or not all(answers):
        raise ThinkKVError(
            f"{path}:{number} needs the keys context, question and answer, none of them empty - see line"
        )
    return Sample(context, f"\n\n{question} {prefix}".rstrip(), tuple(answers))
