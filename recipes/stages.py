"""Running one stage: from the weights before it to those after it, resuming where it was killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.recipes.checkpoints import StageCallback, copy_weights, is_last, newest_complete
from thinkkv.recipes.config import GrpoStage, Recipe, RejectionSamplingStage, ScpoStage, SftStage
from thinkkv.recipes.metrics import MetricsLog
from thinkkv.recipes.problems import Problems
from thinkkv.recipes.processes import Processes
from thinkkv.recipes.responses import sample, text_of
from thinkkv.recipes.rewards import RIGHT_ABOVE, build_reward, call
from thinkkv.recipes.smartthinker.sampling import Sample, read_samples, sample_in_batches, select, write_samples
from thinkkv.recipes.smartthinker.sft import tokenise_samples, tokenise_traces
from thinkkv.recipes.trainer_arguments import rl_arguments, scpo_settings, sft_arguments
from thinkkv.recipes.weights import Weights, open_model

DATASET = "dataset.jsonl"
"""What rejection sampling keeps, in its stage's folder."""

Told = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """What every stage of a run works with.

    Args:
        recipe: the recipe.
        folder: the run's.
        tokenizer: the model's.
        problems: the recipe's.
        log: the metrics.
        processes: the group.
        told: called with step, total and values of every log.
        note: called with a line worth saying.
    """

    recipe: Recipe
    folder: Path
    tokenizer: Any
    problems: Problems
    log: MetricsLog
    processes: Processes
    told: Told
    note: Callable[[str], None]

    def stage_folder(self, index: int) -> Path:
        """Where a stage keeps its files."""
        return self.folder / "stages" / f"{index}-{self.recipe.stages[index].kind}"


@dataclass(frozen=True)
class Trained:
    """What a stage did.

    Args:
        steps: updates, or sampled batches.
        weights: after it.
        facts: worth keeping in ``eval.json``.
    """

    steps: int
    weights: Weights
    facts: dict[str, Any] = field(default_factory=dict)


def run_stage(work: Work, index: int, before: Weights) -> Trained:
    """Run or resume a stage."""
    stage = work.recipe.stages[index]
    if isinstance(stage, RejectionSamplingStage):
        return _sample(work, index, stage, before)
    if isinstance(stage, SftStage):
        return _fine_tune(work, index, stage, before)
    return _reinforce(work, index, stage, before)


def _sample(work: Work, index: int, stage: RejectionSamplingStage, before: Weights) -> Trained:
    """Rejection sampling; every process samples its share of the prompts."""
    recipe, group = work.recipe, work.processes
    rows = list(enumerate(work.problems.train[: stage.prompts]))
    folder = work.stage_folder(index)
    model = open_model(recipe, before).eval()
    reward = build_reward(recipe.reward[0], recipe.steps)
    per_batch = max(1, recipe.rollout.batch_size // stage.samples)
    own = rows[group.rank :: group.world]
    batches = -(-len(own) // per_batch)

    def draw(chunk: Sequence[tuple[int, dict[str, Any]]], seed: int) -> list[Sample]:
        repeated = [(at, row) for at, row in chunk for _ in range(stage.samples)]
        prompts = [row["prompt"] for _, row in repeated]
        seed = (recipe.seed * 1_000_003 + seed) * 101 + index
        ids = sample(model, work.tokenizer, prompts, recipe.rollout, seed=seed)
        texts = [text_of(work.tokenizer, row) for row in ids]
        scores = call(reward, [row for _, row in repeated], texts, ids)
        return [
            Sample(at, row["prompt"], tuple(tokens), text, score)
            for (at, row), tokens, text, score in zip(repeated, ids, texts, scores, strict=True)
        ]

    def done(number: int, found: list[Sample], seconds: float | None) -> None:
        values = {
            "accuracy": sum(item.score > RIGHT_ABOVE for item in found) / len(found),
            "mean_tokens": sum(len(item.ids) for item in found) / len(found),
        }
        if seconds is not None:
            values["tokens_per_second"] = sum(len(item.ids) for item in found) / seconds
        if group.main:
            work.log.append(index, stage.kind, number, values)
            work.told(number, batches, values)

    if group.main:
        work.log.rewind(index, -1)
    path = folder / f"samples-{group.rank}.jsonl"
    sample_in_batches(path, own, samples=stage.samples, prompts_per_batch=per_batch, draw=draw, done=done)
    group.wait()
    every = [item for rank in range(group.world) for item in read_samples(folder / f"samples-{rank}.jsonl")]
    kept = select(every, keep=stage.keep, per_prompt=stage.keep_per_prompt, seed=recipe.seed)
    if not kept:
        raise ThinkKVError(
            f"none of {len(every)} samples is right - train the model on traces first, or take easier problems"
        )
    if group.main:
        write_samples(folder / DATASET, kept)
    group.wait()
    facts = {"samples": len(every), "right": sum(item.score > RIGHT_ABOVE for item in every), "kept": len(kept)}
    work.note(f"kept {len(kept)} of {facts['right']} right samples ({len(every)} in all)")
    return Trained(batches, before, facts)


def _fine_tune(work: Work, index: int, stage: SftStage, before: Weights) -> Trained:
    from datasets import Dataset
    from trl import SFTTrainer

    recipe, folder = work.recipe, work.stage_folder(index)
    arguments = sft_arguments(recipe, index, folder / "checkpoints")
    limit = arguments.max_length
    if recipe.trains_on_traces(index):
        data = tokenise_traces(work.problems.train, work.tokenizer, limit)
    else:
        data = tokenise_samples(read_samples(_sampled_before(work, index)), work.tokenizer, limit)
    if data.too_long:
        work.note(f"left out {data.too_long} rows longer than max_length {limit}, {len(data.rows)} remain")
    model = open_model(recipe, before, trainable=True, full=stage.tune == "full")
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(data.rows), processing_class=work.tokenizer
    )
    full = stage.tune == "full" or recipe.lora is None
    return _fit(work, index, trainer, before, full, {"rows": len(data.rows), "too_long": data.too_long})


def _sampled_before(work: Work, index: int) -> Path:
    """What the last rejection sampling before a stage kept."""
    last = max(at for at in range(index) if isinstance(work.recipe.stages[at], RejectionSamplingStage))
    return work.stage_folder(last) / DATASET


def _reinforce(work: Work, index: int, stage: ScpoStage | GrpoStage, before: Weights) -> Trained:
    recipe, folder = work.recipe, work.stage_folder(index)
    arguments = rl_arguments(recipe, index, folder / "checkpoints")
    trainer = build_rl_trainer(
        recipe, stage, arguments, open_model(recipe, before, trainable=True), work.tokenizer, work.problems
    )
    return _fit(work, index, trainer, before, recipe.lora is None, {})


def build_rl_trainer(
    recipe: Recipe, stage: ScpoStage | GrpoStage, arguments: Any, model: Any, tokenizer: Any, problems: Problems
) -> Any:
    """The trainer of an RL stage.

    Args:
        recipe: the recipe.
        stage: one of its stages.
        arguments: GRPOConfig.
        model: trainable.
        tokenizer: the model's.
        problems: the recipe's.
    """
    from datasets import Dataset

    from thinkkv.recipes.smartthinker.length_penalty import LengthPenaltyTrainer
    from thinkkv.recipes.smartthinker.rollouts import patched_rollouts
    from thinkkv.recipes.smartthinker.scpo import SCPOTrainer

    rows = [{key: value for key, value in row.items() if key != "completion"} for row in problems.train]
    shared: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "reward_funcs": [build_reward(reward, recipe.steps) for reward in recipe.reward],
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
    }
    if recipe.rollout.policy != "full":
        shared["rollout_func"] = patched_rollouts(recipe.rollout.policy, recipe.rollout.ratio)
    if isinstance(stage, GrpoStage):
        return LengthPenaltyTrainer(alpha=stage.length_penalty, **shared)
    return SCPOTrainer(scpo=scpo_settings(stage, recipe.seed), rules=recipe.steps, oracle=problems.weigh, **shared)


def _fit(work: Work, index: int, trainer: Any, before: Weights, full: bool, facts: dict[str, Any]) -> Trained:
    """Train from the newest whole checkpoint, and save the weights."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    folder, main = work.stage_folder(index), work.processes.main
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StageCallback(work.log, index, work.recipe.stages[index].kind, work.told))
    checkpoint = newest_complete(folder / "checkpoints", clean=main)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    if main:
        work.log.rewind(index, done if checkpoint else -1)
    if checkpoint:
        work.note(f"resuming at step {done}")
    work.processes.wait()
    saved = folder / "weights"
    if main and saved.exists():
        shutil.rmtree(saved)  # of a run that was killed while it saved
    work.processes.wait()
    if checkpoint and is_last(checkpoint):
        # Resumed from its last checkpoint, a trainer would take one step too many.
        if main:
            copy_weights(checkpoint, saved)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        done = trainer.state.global_step
        trainer.save_model(str(saved))
    if main:
        work.tokenizer.save_pretrained(saved)
    work.processes.wait()
    where = str(saved.resolve())
    after = Weights(where, None) if full else Weights(before.base, where)
    return Trained(done, after, facts)
