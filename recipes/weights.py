"""The weights that a run trains: where they come from, and how they pass from stage to stage.

A run has a base (the recipe's model, or what a full tuning made of it) and perhaps an adapter on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thinkkv.patches.errors import RecipeError
from thinkkv.recipes.config import ModelConfig, Recipe
from thinkkv.recipes.strict_yaml import check_options


@dataclass(frozen=True)
class Weights:
    """What a stage left behind.

    Args:
        base: checkpoint folder; None: the recipe's own model.
        adapter: adapter folder; None: none yet.
    """

    base: str | None = None
    adapter: str | None = None


def load_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer alone, without the weights where the source allows it."""
    if recipe.model.scratch is not None:
        return _task_tokenizer(recipe)
    from transformers import AutoTokenizer

    from thinkkv.sdk import model_sources, models

    source = model_sources.resolve(_name(recipe.model))
    if source.kind == "gguf":
        return models.load(_name(recipe.model), dtype=recipe.model.dtype)[1]
    tokenizer = AutoTokenizer.from_pretrained(
        model_sources.fetch(source), trust_remote_code=False, local_files_only=True
    )
    return _with_padding(tokenizer)


def open_model(recipe: Recipe, weights: Weights, *, trainable: bool = False, full: bool = False) -> Any:
    """Load the model of a stage.

    Args:
        recipe: the recipe.
        weights: what the stage before left.
        trainable: with an adapter to train, made anew where there is none; otherwise for evaluation.
        full: without an adapter, all weights trainable.
    """
    model = _base(recipe, weights)
    if full or (recipe.lora is None and weights.adapter is None):
        return model
    from peft import PeftModel, get_peft_model

    if weights.adapter is not None:
        return PeftModel.from_pretrained(model, weights.adapter, is_trainable=trainable)
    if not trainable:
        return model
    try:
        return get_peft_model(model, lora_config(recipe))
    except ValueError as error:  # the model has no such modules, or more
        problem = f"lora does not fit the model: {str(error).splitlines()[0]} - see PEFT's LoraConfig"
        raise recipe.document.error(("lora",), problem) from None


def lora_config(recipe: Recipe) -> Any:
    """PEFT's configuration of the recipe's ``lora`` block.

    Raises:
        RecipeError: PEFT does not know an option, or what to do with its value.
    """
    from peft import LoraConfig

    options = dict(recipe.lora or {})
    check_options(recipe.document, ("lora",), options, LoraConfig, "PEFT")
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **options})
    except (TypeError, ValueError) as error:
        raise recipe.document.error(("lora",), f"lora: {error} - see PEFT's LoraConfig") from None


def _base(recipe: Recipe, weights: Weights) -> Any:
    import torch

    from thinkkv.sdk import models

    if weights.base is None and recipe.model.scratch is not None:
        return _scratch(recipe)
    device = "cuda" if torch.cuda.is_available() else None
    model, _ = models.load(weights.base or _name(recipe.model), dtype=recipe.model.dtype, device=device)
    return model


def _scratch(recipe: Recipe) -> Any:
    """A random Llama for the task's vocabulary, the same for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _task_tokenizer(recipe)
    assert recipe.model.scratch is not None
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                **recipe.model.scratch,
            )
        )


def _task_tokenizer(recipe: Recipe) -> Any:
    from thinkkv.recipes.tasks import running_value

    if recipe.data.source != "task:running-value":
        raise RecipeError("model.scratch has a tokenizer for task:running-value only - name a model instead")
    return running_value.tokenizer(running_value.options(recipe.data.options)[0])


def _name(model: ModelConfig) -> str:
    assert model.name is not None
    return model.name


def _with_padding(tokenizer: Any) -> Any:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
