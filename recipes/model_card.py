"""The model card of a run: what was trained, how, with what effect, and how to use and repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from thinkkv.recipes.config import Recipe

PACKAGES = ("thinkkv", "torch", "transformers", "trl", "peft")


def model_card(recipe: Recipe, stages: Sequence[Mapping[str, Any]], merged: str | None) -> str:
    """Markdown with a metadata header.

    Args:
        recipe: what ran.
        stages: results, as in ``eval.json``.
        merged: folder of the merged checkpoint, if there is one.
    """
    base = recipe.model.name or "a small Llama from random weights"
    head = "---\nlibrary_name: peft\n" + (f"base_model: {recipe.model.name}\n" if recipe.model.name else "")
    table = "\n".join(_line(stage) for stage in stages)
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    rewards = ", ".join(f"`{reward.name}` x {reward.weight:g}" for reward in recipe.reward)
    use = (
        f"`AutoModelForCausalLM.from_pretrained({merged!r})`"
        if merged
        else "`PeftModel.from_pretrained(base, 'adapter')`"
        if recipe.lora is not None
        else "`AutoModelForCausalLM.from_pretrained('adapter')`"
    )
    return f"""{head}tags: [thinkkv, smartthinker, reasoning]
---

# {recipe.name}

{base}, trained to think shorter with the recipe `{recipe.name}` of [thinkkv](https://pypi.org/project/thinkkv/): our
reconstruction of SmartThinker (arXiv:2507.04348), not the authors' code.

| stage | steps | accuracy | mean tokens | critical share |
|---|---|---|---|---|
{table}

Before and after each stage, on {recipe.data.eval_rows} held-out problems of `{recipe.data.source}`, one sampled
response each (temperature {recipe.rollout.temperature:g}, at most {recipe.rollout.max_new_tokens} tokens, cache policy
`{recipe.rollout.policy}`). Right is what the first reward says; rewards: {rewards}.

Load it with {use}. `resolved.yaml` repeats the run: `thinkkv train resolved.yaml`. Curves: `curves.png`; every step:
`metrics.jsonl`; responses with their steps and importance: `completions.jsonl`.

{versions}; seed {recipe.seed}.
"""


def _line(stage: Mapping[str, Any]) -> str:
    def change(key: str, form: str) -> str:
        before, after = stage[key]["before"], stage[key]["after"]
        return " -> ".join("-" if value is None else format(value, form) for value in (before, after))

    parts = (change("accuracy", ".3f"), change("mean_tokens", ".1f"), change("critical_share", ".3f"))
    return f"| `{stage['kind']}` | {stage['steps']} | {' | '.join(parts)} |"
