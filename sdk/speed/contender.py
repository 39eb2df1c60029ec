"""What takes part in a speed comparison: one runtime with one policy at one ratio, and a conversation of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from thinkkv.patches.errors import ThinkKVError


@dataclass(frozen=True)
class Held:
    """Bytes of a cache.

    Args:
        physical: allocated.
        used: of them in use.
        full: if every head kept every token.
    """

    physical: int
    used: int
    full: int


class Contender(ABC):
    """One side of a comparison.

    Attributes:
        runtime, policy, ratio: what it is called in the rows.
    """

    runtime: str
    policy: str
    ratio: float

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around everything that is timed: what must be so, and costs time that does not count."""
        yield

    @abstractmethod
    def prefill(self, ids: Sequence[int], new_tokens: int) -> None:
        """Start over with a prompt, and choose the first token.

        Args:
            ids: of the prompt.
            new_tokens: that will be decoded at most.
        """

    @abstractmethod
    def step(self) -> None:
        """Feed the token that was chosen last, and choose the next."""

    @abstractmethod
    def held(self) -> Held:
        """Of the conversation as it stands."""


def check_context(limit: int | None, context: int, new_tokens: int) -> None:
    """Raise ThinkKVError where prompt and new tokens do not fit a model."""
    if limit is not None and context + new_tokens > limit:
        raise ThinkKVError(
            f"{context} prompt tokens and {new_tokens} new ones exceed the model's context of {limit} - "
            "lower --contexts or --new-tokens"
        )
