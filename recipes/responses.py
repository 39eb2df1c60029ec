"""Sampling responses outside a trainer: for rejection sampling and for the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from thinkkv.recipes.config import RolloutConfig


def sample(model: Any, tokenizer: Any, prompts: Sequence[str], rollout: RolloutConfig, *, seed: int) -> list[list[int]]:
    """One response to each prompt, in one batch.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompts: rendered texts.
        rollout: how to sample; another policy than ``full`` patches the model meanwhile.
        seed: of this batch: the same batch gives the same responses, whatever was sampled before.

    Returns:
        Token ids, cut behind the first end token.
    """
    import torch

    from thinkkv.sdk.patching import apply

    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
    patched: Any = nullcontext()
    if rollout.policy != "full":
        patched = apply(model, policy=rollout.policy, ratio=rollout.ratio)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), patched:
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=rollout.max_new_tokens,
            do_sample=True,
            temperature=rollout.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    ends = end_tokens(model, tokenizer)
    return [row[: end_of(row, ends)] for row in out[:, inputs.input_ids.shape[1] :].tolist()]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end a response: the tokenizer's and the generation config's."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a response as rewards see it: without end and padding tokens."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def end_of(ids: Sequence[int], ends: set[int]) -> int:
    """How many tokens a response has, its first end token included."""
    return next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
