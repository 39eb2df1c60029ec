"""SCPO on TRL: step-level length control inside GRPO's loss.

The outcome keeps TRL's group-relative advantage, which is S-GAE of one step with lambda = 1. Added to it, token by
token, is the step stream: S-GAE over the step rewards, separately over a prompt's right and wrong responses, so that
it moves credit between steps and never doubles the outcome. Both the addition and its strength are this project's
choice.

Three methods are wrapped with ``super()``; no TRL code is copied. ``tests/recipes/test_scpo.py`` holds the hooks
against hand-computed losses, so that an incompatible TRL fails there.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import gather_object

from thinkkv.patches.errors import RecipeError
from thinkkv.recipes.smartthinker.advantage import Whitening, baseline, broadcast, s_gae
from thinkkv.recipes.smartthinker.clipping import ClipRange, upper_bounds
from thinkkv.recipes.smartthinker.importance import (
    CRITICAL_FROM,
    Estimator,
    Probe,
    batches,
    probe,
    score_naive,
    score_packed,
    takes_masks,
    weight,
)
from thinkkv.recipes.smartthinker.reward import Rollout, StepReward, step_rewards
from thinkkv.recipes.smartthinker.rollouts import RolloutTrainer
from thinkkv.recipes.smartthinker.steps import StepRules, Steps, prompt_opens_reasoning, split_steps
from thinkkv.sdk.evaluating import evaluating

Control = Literal["uniform", "random", "oracle"]
Importance = Estimator | Control

CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""TRL's losses that clip the ratio on both sides."""


@dataclass(frozen=True)
class SCPO:
    """The four parts and their strengths.

    Args:
        strength: of the step stream beside the outcome's advantage; 0 leaves GRPO.
        importance: how steps are weighed. ``uniform`` (1/2 each), ``random`` and ``oracle`` are controls.
        window: steps that ``next-steps`` looks at.
        temperature: nats at which a step's weight reaches 63 %.
        reward: strengths of the step reward.
        gamma: discount over steps.
        lam: trace decay over steps.
        floor: see ``s_gae``.
        whitening: what the step advantages are scaled over.
        step_level: False gives every token its response's mean instead: S-GAE switched off.
        clip: bounds of the importance ratio.
        adaptive_clip: False clips every response to ``clip``.
        max_tokens: padded tokens in one scoring forward.
        seed: of ``random``.
    """

    strength: float = 0.5
    importance: Importance = "next-steps"
    window: int = 2
    temperature: float = 1.0
    reward: StepReward = field(default_factory=StepReward)
    gamma: float = 1.0
    lam: float = 0.5
    floor: float = 0.1
    whitening: Whitening = "group"
    step_level: bool = True
    clip: ClipRange = field(default_factory=ClipRange)
    adaptive_clip: bool = True
    max_tokens: int = 4096
    seed: int = 0


class SCPOTrainer(RolloutTrainer):
    """GRPO with a step stream in the advantages and a clip range per response.

    Args:
        scpo: the settings.
        rules: how responses split into steps.
        oracle: true weight of a step's text, for ``importance="oracle"``.
    """

    def __init__(
        self,
        *args: Any,
        scpo: SCPO | None = None,
        rules: StepRules | None = None,
        oracle: Callable[[str], float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.scpo, self.rules, self.oracle = scpo or SCPO(), rules or StepRules(), oracle
        self._draw = random.Random(self.scpo.seed)
        self._scored_at: float | None = None
        self._scoring_seconds = 0.0
        super().__init__(*args, **kwargs)
        check(self.args, self.scpo, knows_importance=oracle is not None)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._note_cost()
        scored = super()._generate_and_score_completions(inputs)
        batch, size = self._rollouts, self.group_size()
        steps = self._split(scored)
        start = time.monotonic()
        weights = self._weights(scored, steps)
        self._scoring_seconds = time.monotonic() - start
        self.note("scpo/importance_seconds", self._scoring_seconds)

        # Normalisers and baselines are over whole prompts, which may straddle processes: every process sees all rows.
        described = gather_object([(part.lengths, row) for part, row in zip(steps, weights, strict=True)])
        rollouts = [
            Rollout(tuple(lengths), right, tuple(row))
            for (lengths, row), right in zip(described, batch.right, strict=True)
        ]
        advantages = step_stream(rollouts, size, self.scpo)[batch.local]
        scored["advantages"] = self._add(scored, steps, advantages)
        scored |= self._bounds(scored, size)
        self._note_steps(rollouts)
        return scored

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        low, high = self.epsilon_low, self.epsilon_high
        self.epsilon_low, self.epsilon_high = inputs["clip_low"][:, None], inputs["clip_high"][:, None]
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        finally:
            self.epsilon_low, self.epsilon_high = low, high
        return loss

    def _split(self, scored: dict[str, Any]) -> list[Steps]:
        """Steps of this process's responses; those that the loss masks or no reward judged have none."""
        decode, judged = self._decode, self._rollouts.judged[self._rollouts.local]
        found = []
        for row, ids in enumerate(self._rollouts.ids):
            if judged[row] and scored["completion_mask"][row].any():
                opened = prompt_opens_reasoning(decode(_unpadded(scored, row)), self.rules)
                found.append(split_steps(ids, decode, self.rules, opened=opened))
            else:
                found.append(Steps((), len(ids), len(ids), finished=False))
        return found

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _weights(self, scored: dict[str, Any], steps: Sequence[Steps]) -> list[list[float]]:
        """Weight of every step of this process's responses; of wrong ones 0, as their reward asks for none."""
        right = self._rollouts.right[self._rollouts.local]
        estimator = self.scpo.importance
        if estimator == "uniform" or estimator == "random" or estimator == "oracle":
            return [
                [self._control(ids, span) if ok else 0.0 for span in part.spans]
                for ids, part, ok in zip(self._rollouts.ids, steps, right, strict=True)
            ]
        rows = [row for row, ok in enumerate(right) if ok]
        probes = [
            probe(
                _unpadded(scored, row),
                self._rollouts.ids[row],
                steps[row],
                estimator=estimator,
                window=self.scpo.window,
            )
            for row in rows
        ]
        found = [[0.0] * len(part.spans) for part in steps]
        for row, gains in zip(rows, self._score(probes), strict=True):
            found[row] = [weight(gain, self.scpo.temperature) for gain in gains]
        return found

    def _control(self, ids: Sequence[int], span: tuple[int, int]) -> float:
        if self.scpo.importance == "oracle":
            assert self.oracle is not None
            return self.oracle(self._decode(ids[slice(*span)]))
        return self._draw.random() if self.scpo.importance == "random" else 0.5

    def _score(self, probes: list[Probe]) -> list[list[float]]:
        """Importance by the model that is trained, adapter on, dropout off."""
        model: Any = self.model
        packed = takes_masks(self.accelerator.unwrap_model(model))
        with evaluating(model), torch.no_grad(), self.accelerator.autocast():
            self._idle(probes, packed)
            if packed:
                return score_packed(model, probes, max_tokens=self.scpo.max_tokens)
            return score_naive(model, probes)

    def _idle(self, probes: Sequence[Probe], packed: bool) -> None:
        """Run as many idle forwards as bring this process to the busiest one's number.

        Sharded models (FSDP, ZeRO-3) exchange weights in every forward, so a process with fewer would leave others
        waiting.
        """
        if self.accelerator.num_processes == 1:
            return
        naive = sum(len(row.spans) + len(row.branches) for row in probes)
        own = len(batches(probes, self.scpo.max_tokens)) if packed else naive
        ids = torch.full((1, 2), self._tokenizer.pad_token_id, device=self.accelerator.device)
        model: Any = self.model
        for _ in range(max(gather_object([own])) - own):
            model(input_ids=ids, use_cache=False)

    def _add(
        self, scored: dict[str, Any], steps: Sequence[Steps], advantages: Sequence[Sequence[float]]
    ) -> torch.Tensor:
        """Outcome plus step stream, [B, T]."""
        outcome = scored["advantages"]
        width = scored["completion_ids"].shape[1]
        stream = [
            broadcast(values, part.spans, width) if self.scpo.step_level else [next(iter(values), 0.0)] * width
            for values, part in zip(advantages, steps, strict=True)
        ]
        total = outcome[:, None] + self.scpo.strength * torch.tensor(stream, device=outcome.device, dtype=outcome.dtype)
        return total * scored["completion_mask"]

    def _bounds(self, scored: dict[str, Any], size: int) -> dict[str, torch.Tensor]:
        """Clip range of this process's responses."""
        clip, right = self.scpo.clip, self._rollouts.right
        high = [clip.high] * len(right)
        if self.scpo.adaptive_clip:
            high = [
                bound
                for begin in range(0, len(right), size)
                for bound in upper_bounds(right[begin : begin + size], clip)
            ]
        local = torch.tensor(high[self._rollouts.local], device=scored["completion_ids"].device)
        return {"clip_low": torch.full_like(local, clip.low), "clip_high": local}

    def _note_cost(self) -> None:
        """Share of the last generation cycle, sampling and updates included, that went into importance."""
        now = time.monotonic()
        if self._scored_at is not None:
            self.note("scpo/importance_share", self._scoring_seconds / max(now - self._scored_at, 1e-9))
        self._scored_at = now

    def _note_steps(self, rollouts: Sequence[Rollout]) -> None:
        right = [rollout for rollout in rollouts if rollout.right and rollout.lengths]
        if not right:
            return
        tokens = sum(sum(rollout.lengths) for rollout in right)
        critical = sum(
            length
            for rollout in right
            for length, value in zip(rollout.lengths, rollout.weights, strict=True)
            if value >= CRITICAL_FROM
        )
        self.note("scpo/steps", sum(len(rollout.lengths) for rollout in right) / len(right))
        self.note("scpo/critical_share", critical / tokens)


def check(arguments: Any, scpo: SCPO, *, knows_importance: bool) -> None:
    """Refuse what TRL's arguments make meaningless.

    Args:
        arguments: GRPOConfig.
        scpo: the settings.
        knows_importance: whether the task has an oracle.

    Raises:
        RecipeError: a part would do nothing, or cannot work.
    """
    if arguments.loss_type not in CLIPPED_LOSSES:
        raise RecipeError(
            f"SCPO clips ratios on both sides and loss_type {arguments.loss_type} does not - "
            f"choose one of {', '.join(CLIPPED_LOSSES)}"
        )
    updates = arguments.steps_per_generation * arguments.num_iterations
    if scpo.adaptive_clip and updates <= arguments.gradient_accumulation_steps:
        raise RecipeError(
            "adaptive clipping is inert while every sample serves one update - set num_iterations to 2 or more, "
            "or adaptive_clip to false"
        )
    if scpo.importance == "oracle" and not knows_importance:
        raise RecipeError("the task knows no true importance - choose another importance than oracle")


def step_stream(rollouts: Sequence[Rollout], size: int, scpo: SCPO) -> list[list[float]]:
    """Step advantages of a batch: pure, and the same on every process.

    Args:
        rollouts: of all processes, a prompt's responses together.
        size: responses per prompt.
        scpo: the settings.

    Returns:
        Per response one value a step; with ``step_level`` off one value for the response.
    """
    found: list[list[float]] = [[] for _ in rollouts]
    classes, rewards = [], []
    for begin in range(0, len(rollouts), size):
        group = rollouts[begin : begin + size]
        scored = step_rewards(group, scpo.reward)
        if not scpo.step_level:
            scored = [[baseline([row])] if row else [] for row in scored]
        for kind in (True, False):
            members = [at for at, rollout in enumerate(group) if rollout.right is kind]
            classes.append([begin + at for at in members])
            rewards.append([scored[at] for at in members])
    advantages = s_gae(rewards, gamma=scpo.gamma, lam=scpo.lam, whitening=scpo.whitening, floor=scpo.floor)
    for members, values in zip(classes, advantages, strict=True):
        for at, row in zip(members, values, strict=True):
            found[at] = row
    return found


def _unpadded(scored: dict[str, Any], row: int) -> list[int]:
    ids: list[int] = scored["prompt_ids"][row][scored["prompt_mask"][row].bool()].tolist()
    return ids
