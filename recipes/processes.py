"""Which of several processes this one is, under ``torchrun`` or ``accelerate launch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """The group of processes that runs a recipe.

    Args:
        rank: this one.
        world: how many.
    """

    rank: int
    world: int

    @classmethod
    def current(cls) -> Processes:
        """The group as the environment says."""
        state = _state()
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            _state().wait_for_everyone()


def _state() -> Any:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
