"""What every RL stage shares: where responses come from, which are right, and the ratio to what sampled them.

``RolloutTrainer`` wraps two methods of TRL's ``GRPOTrainer`` with ``super()`` and copies none of its code. Responses
sampled by a patched model come from another distribution than the one that is trained: their own log-probabilities
then stand below the importance ratio, in place of the trained model's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOTrainer

from thinkkv.recipes.responses import end_of
from thinkkv.recipes.rewards import RIGHT_ABOVE
from thinkkv.sdk.evaluating import evaluating


@dataclass(frozen=True)
class Rollouts:
    """The batch that is being scored.

    Args:
        ids: this process's responses, tokens without padding.
        right: of all processes' responses, in their global order.
        judged: of the same, whether the first reward said anything.
        local: which of those are this process's.
    """

    ids: tuple[tuple[int, ...], ...]
    right: tuple[bool, ...]
    judged: tuple[bool, ...]
    local: slice


class RolloutTrainer(GRPOTrainer):
    """GRPO that remembers its rollouts while they are scored, and what sampled them."""

    _rollouts: Rollouts

    def group_size(self) -> int:
        """Responses per prompt in the current mode."""
        size = self.num_generations if self._trains() else self.num_generations_eval
        assert size is not None
        return size

    def note(self, name: str, value: float) -> None:
        """Add a value to the metrics that the next log line averages."""
        self._metrics["train" if self._trains() else "eval"][name].append(value)

    def _trains(self) -> bool:
        return self.model is not None and bool(self.model.training)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> torch.Tensor:
        rewards: torch.Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # Rewards come back gathered over processes; prompts and ids are this process's own.
        begin = self.accelerator.process_index * len(prompts)
        self._rollouts = Rollouts(
            tuple(map(tuple, completion_ids_list)),
            tuple((rewards[:, 0] > RIGHT_ABOVE).tolist()),
            tuple((~rewards[:, 0].isnan()).tolist()),
            slice(begin, begin + len(prompts)),
        )
        self.note("accuracy", sum(self._rollouts.right) / len(self._rollouts.right))
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.rollout_func is not None:
            scored["old_per_token_logps"] = scored["sampling_per_token_logps"]
        return scored


def patched_rollouts(policy: str, ratio: float) -> Callable[[Sequence[Any], Any], dict[str, Any]]:
    """A TRL ``rollout_func`` that samples with a compressed cache.

    Args:
        policy: of ``thinkkv.sdk.apply``.
        ratio: share of the prompt's full cache.
    """
    from trl.trainer.utils import pad

    from thinkkv.sdk.patching import apply

    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        rows = [torch.tensor(ids) for ids in prompt_ids]
        padding = trainer._tokenizer.pad_token_id
        device = trainer.accelerator.device
        model = trainer.accelerator.unwrap_model(trainer.model)
        settings = copy.deepcopy(trainer.generation_config)
        settings.return_dict_in_generate = settings.output_logits = True
        with evaluating(model), torch.no_grad(), apply(model, policy=policy, ratio=ratio):
            out = model.generate(
                input_ids=pad(rows, padding_value=padding, padding_side="left").to(device),
                attention_mask=pad([torch.ones_like(row) for row in rows], 0, "left").to(device),
                generation_config=settings,
            )
        width = max(map(len, rows))
        responses, logps = _until_end(out, width, trainer)
        return {"prompt_ids": prompt_ids, "completion_ids": responses, "logprobs": logps}

    return rollout


def _until_end(out: Any, width: int, trainer: Any) -> tuple[list[list[int]], list[list[float]]]:
    """Responses cut behind their first end token, and the log-probability of each token at the training temperature."""
    ends = set(trainer.eos_token_ids)
    sampled = out.sequences[:, width:].cpu()
    logps = torch.stack(
        [
            (logits.float() / trainer.temperature).log_softmax(-1).gather(-1, out.sequences[:, width + at, None])[:, 0]
            for at, logits in enumerate(out.logits)
        ],
        dim=1,
    ).cpu()
    responses, scores = [], []
    for ids, row in zip(sampled.tolist(), logps.tolist(), strict=True):
        stop = end_of(ids, ends)
        responses.append(ids[:stop])
        scores.append(row[:stop])
    return responses, scores
