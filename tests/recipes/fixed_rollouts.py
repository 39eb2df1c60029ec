"""A trainer on a tiny model whose responses are given, so that every number of a step can be computed by hand.

Also a program: ``torchrun`` runs it on two processes, and it writes what each computed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig

from thinkkv.recipes.smartthinker.scpo import SCPO, SCPOTrainer
from thinkkv.recipes.tasks.running_value import tokenizer

PROMPTS = (" 3 ; a +1 ; ?<think>", " 1 ; a +2 ; b -1 ; ?<think>", " 4 ; a +1 ; ?<think>")
RESPONSES = (
    (" a : 3 +1 = 4\n\n</think> 4<eos>", 1.0),
    (" a : 3 +1 = 4\n\n so a is 4 now\n\n</think> 4<eos>", 1.0),
    (" a = 2\n\n hmm let me see\n\n</think> 2<eos>", 0.0),
    (" hmm let me see\n\n a : 3 +1 = 4\n\n hmm let me see\n\n</think> 4<eos>", 1.0),
    (" a : 1 +2 = 3\n\n b : 3 -1 = 2\n\n</think> 2<eos>", 1.0),
    (" a = 3\n\n b = 1\n\n</think> 1<eos>", 0.0),
    (" a = 3\n\n b = 2\n\n so b is 2 now\n\n</think> 2<eos>", 1.0),
    (" hmm let me see\n\n hmm let me see\n\n hmm", 0.0),
    ("</think> 0<eos>", 1.0),
    ("</think> 1<eos>", 0.0),
    (" a : 4 +1 = 0\n\n</think> 0<eos>", 1.0),
    (" a = 1\n\n</think> 1<eos>", 0.0),
)
"""Four responses to each prompt, with their rewards."""

SIZE = 4
OLD_LOGP = -3.0
"""What the sampler is said to have given every token."""


def tiny_llama(seed: int = 5, **different: Any) -> LlamaForCausalLM:
    """A random model for the task's vocabulary; sizes may be different."""
    torch.manual_seed(seed)
    words = tokenizer()
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 256,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
            **sizes | different,
        )
    )


def given_rollouts(prompts: Any, trainer: Any) -> dict[str, Any]:
    """The responses of the rows that this process holds."""
    words = tokenizer()
    begin = trainer.accelerator.process_index * len(prompts)
    ids = [words(text).input_ids for text, _ in RESPONSES[begin : begin + len(prompts)]]
    return {
        "prompt_ids": [words(prompt).input_ids for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[OLD_LOGP] * len(row) for row in ids],
    }


def given_rewards(prompts: Any, completion_ids: Any, **_: Any) -> list[float]:
    """Their rewards."""
    words = tokenizer()
    table = [(PROMPTS[index // SIZE], row) for index, row in enumerate(RESPONSES)]
    known = {(prompt, tuple(words(text).input_ids)): value for prompt, (text, value) in table}
    return [known[prompt, tuple(ids)] for prompt, ids in zip(prompts, completion_ids, strict=True)]


def new_trainer(
    folder: Path, batch: int, scpo: SCPO, *, rollouts: Any = given_rollouts, rewards: Any = given_rewards
) -> SCPOTrainer:
    """An untrained trainer that can score a batch and compute its loss."""
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=SIZE,
        num_iterations=2,
        max_completion_length=40,
        bf16=False,
        use_cpu=True,
        beta=0.0,
        report_to=[],
        gradient_checkpointing=False,
    )
    trainer = SCPOTrainer(
        model=tiny_llama(),
        reward_funcs=[rewards],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tokenizer(),
        rollout_func=rollouts,
        scpo=scpo,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def score(trainer: SCPOTrainer, batch: int) -> dict[str, Any]:
    """Score this process's rows."""
    begin = trainer.accelerator.process_index * batch
    inputs = [{"prompt": PROMPTS[index // SIZE]} for index in range(begin, begin + batch)]
    return trainer._generate_and_score_completions(inputs)


def main() -> None:
    """Score on every process of a ``torchrun`` and write the numbers."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    batch = len(RESPONSES) // int(os.environ["WORLD_SIZE"])
    trainer = new_trainer(folder, batch, SCPO())
    scored = score(trainer, batch)
    lengths = scored["completion_mask"].sum(1).tolist()
    found = {
        "advantages": [row[:n] for row, n in zip(scored["advantages"].tolist(), lengths, strict=True)],
        "clip_high": scored["clip_high"].tolist(),
    }
    (folder / f"rank{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
