"""The baseline that SCPO is measured against: GRPO whose reward falls with a response's whole length.

Arora and Zanette (arXiv:2502.04463), in the same trainer, with the same rollouts and the same rewards otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object

from thinkkv.recipes.smartthinker.reward import global_penalty
from thinkkv.recipes.smartthinker.rollouts import RolloutTrainer


class LengthPenaltyTrainer(RolloutTrainer):
    """GRPO with a global length penalty on the first reward.

    Args:
        alpha: strength in [0, 1); 0 is plain GRPO.
    """

    def __init__(self, *args: Any, alpha: float = 0.0, **kwargs: Any) -> None:
        self.alpha = alpha
        super().__init__(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if not self.alpha:
            return rewards
        lengths = gather_object([len(ids) for ids in completion_ids_list])
        right, size = self._rollouts.right, self.group_size()
        shaped = rewards.clone()
        for begin in range(0, len(lengths), size):
            group = slice(begin, begin + size)
            penalty = global_penalty(lengths[group], right[group], self.alpha)
            factor = [value if ok else 1.0 for value, ok in zip(penalty, right[group], strict=True)]
            shaped[group, 0] *= torch.tensor(factor, device=rewards.device)
        return shaped
