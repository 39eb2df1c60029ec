"""That SCPO teaches: from one verbose start, a few updates shorten the reasoning, keep its critical steps and answers.

The start is trained here, on easy problems of the tiny recipe's task, in seconds. A flipped reward, importance that
does not tell steps apart, or advantages on the wrong tokens fail.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import GRPOConfig

from tests.recipes.fixed_rollouts import tiny_llama
from thinkkv.recipes.config import RewardConfig, RolloutConfig
from thinkkv.recipes.responses import sample, text_of
from thinkkv.recipes.rewards import build_reward, call
from thinkkv.recipes.smartthinker.scpo import SCPO, SCPOTrainer
from thinkkv.recipes.smartthinker.steps import StepRules
from thinkkv.recipes.tasks.running_value import (
    BREAK,
    CRITICAL,
    EASY,
    END_THINK,
    MODULUS,
    Problem,
    Style,
    step_kind,
    tokenizer,
    trace,
)

pytestmark = pytest.mark.slow
RULES = StepRules(min_tokens=1)
REWARD = build_reward(RewardConfig("exact"), RULES)
ROLLOUT = RolloutConfig(max_new_tokens=96)


def problems(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Of two operations, with verbose traces."""
    drawn = [Problem(rng.randrange(MODULUS), tuple(rng.choices(EASY, k=2)), hard=False) for _ in range(count)]
    return [
        {"prompt": problem.prompt, "answer": problem.answer, "completion": trace(problem, rng, Style())}
        for problem in drawn
    ]


@pytest.fixture(scope="module")
def verbose() -> LlamaForCausalLM:
    """A model that reasons right and at length."""
    words, rng = tokenizer(), random.Random(0)
    model = tiny_llama(0, hidden_size=64, intermediate_size=128, num_key_value_heads=4, initializer_range=0.1)
    steps = 300
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = problems(16, rng)
        texts = [row["prompt"] + row["completion"] for row in rows]
        batch = words(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        labels[:, : len(words(rows[0]["prompt"]).input_ids)] = -100  # prompts are of one length
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        adam.step()
        schedule.step()
        adam.zero_grad()
    return model


def answered(model: Any) -> tuple[float, float, float]:
    """Accuracy, mean tokens and true critical share on the same held-out problems."""
    words, rows = tokenizer(), problems(128, random.Random(1))
    ids = sample(model.eval(), words, [row["prompt"] for row in rows], ROLLOUT, seed=0)
    texts = [text_of(words, row) for row in ids]
    scores = call(REWARD, rows, texts, ids)
    steps = [step for text in texts for step in text.split(END_THINK)[0].split(BREAK) if step]
    critical = sum(len(words(step).input_ids) for step in steps if step_kind(step) in CRITICAL)
    every = sum(len(words(step).input_ids) for step in steps)
    return sum(scores) / len(rows), sum(map(len, ids)) / len(ids), critical / every


def trained(start: LlamaForCausalLM, folder: Path, settings: SCPO) -> Any:
    """The start after a few updates."""
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in problems(200, random.Random(2))]
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=8,
        num_iterations=2,
        max_steps=16,
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        max_completion_length=ROLLOUT.max_new_tokens,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        seed=0,
    )
    trainer = SCPOTrainer(
        model=copy.deepcopy(start),
        args=arguments,
        reward_funcs=[REWARD],
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        scpo=settings,
        rules=RULES,
    )
    trainer.train()
    return trainer.model


def test_a_few_updates_shorten_the_reasoning_and_keep_what_is_critical(verbose: Any, tmp_path: Path) -> None:
    accuracy, tokens, share = answered(verbose)
    assert accuracy > 0.8
    assert share < 0.6
    after_accuracy, after_tokens, after_share = answered(trained(verbose, tmp_path, SCPO()))
    # Here 32 tokens go to 19 and a share of .47 to .89. Without the step stream: 28 and .57; with random or uniform
    # importance more than 37 and less than .40; with the stream's sign turned 59 and .23.
    assert after_tokens < 0.75 * tokens
    assert after_share > share + 0.2
    assert after_accuracy > accuracy - 0.08  # two standard errors of 128 answers
