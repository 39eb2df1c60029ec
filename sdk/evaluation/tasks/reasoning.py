"""Reasoning problems of reasoning-gym, judged by their own verifiers, after a context of solved ones.

The problems themselves are short: solved examples of the same generator fill the context, so that there is something
to compress and something to learn the form of an answer from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.evaluation.sample import Encoded, Sample, fit
from thinkkv.sdk.evaluation.tasks.task import Task
from thinkkv.sdk.extras import require

DEFAULT_GENERATOR = "chain_sum"
LONGEST = 1000
"""Solved examples at most."""


@dataclass(frozen=True)
class Reasoning(Task):
    """One generator.

    Args:
        generator: its name in reasoning-gym.
        name: of the task.
    """

    generator: str
    name: str

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        """A problem behind as many solved ones as fit."""
        problems = self._problems(seed * 1_000_003 + index)
        asked = problems[0]

        def layout(pieces: int) -> Sample:
            if pieces >= LONGEST:
                raise ThinkKVError(
                    f"{self.name} has no {pieces} examples for {size} tokens - ask for a smaller context"
                )
            solved = (f"{_asked(entry)} {entry['answer']}" for entry in (problems[i + 1] for i in range(pieces)))
            context = "\n\n".join(["Solve the problems.", *solved])
            return Sample(context, f"\n\n{_asked(asked)}", (str(asked["answer"]),), asked)

        return fit([layout], tokenizer, size)[0]

    def score(self, sample: Sample, said: str) -> float:
        """The verifier's, on the first line."""
        import reasoning_gym

        answer = (said.strip().splitlines() or [""])[0].strip()
        return float(reasoning_gym.get_score_answer_fn(self.generator)(answer, sample.entry))

    def _problems(self, seed: int) -> Any:
        import reasoning_gym

        try:
            return reasoning_gym.create_dataset(self.generator, size=LONGEST + 1, seed=seed)
        except ValueError as error:
            raise ThinkKVError(f"{self.name}: {error} - see reasoning-gym's list of data sets") from None


def reasoning(generator: str | None) -> Reasoning:
    """The task of a generator.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
    """
    require(("reasoning_gym",), extra="gym", purpose="the task reasoning")
    return Reasoning(generator or DEFAULT_GENERATOR, f"reasoning:{generator}" if generator else "reasoning")


def _asked(entry: Mapping[str, Any]) -> str:
    return f"Problem: {entry['question']}\nAnswer:"
