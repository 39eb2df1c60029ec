"""Rewards by name, each with TRL's signature: what a response is worth, given its row of the data.

The answer is what stands behind the closing think tag; a response that never closes its reasoning has none.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from thinkkv.patches.errors import RecipeError
from thinkkv.recipes.config import RewardConfig
from thinkkv.recipes.smartthinker.steps import StepRules
from thinkkv.sdk.extras import require

Reward = Callable[..., list[float]]

RIGHT_ABOVE = 0.5
"""A response is right when its first reward is above this."""


def build_reward(config: RewardConfig, rules: StepRules) -> Reward:
    """The function of a name.

    Raises:
        RecipeError: there is none.
        MissingExtraError: it needs a package that is not installed.
    """
    if config.name in _SCORES:
        packages, extra = _NEEDS.get(config.name, ((), "train"))
        require(packages, extra=extra, purpose="this recipe")
        return _named(config.name, partial(_each, _SCORES[config.name], rules))
    module, dot, attribute = config.name.rpartition(".")
    if not dot:
        raise RecipeError(f"no reward {config.name!r} - choose {', '.join(_SCORES)}, or a dotted path to a function")
    try:
        found: Reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"reward {config.name} cannot be imported ({error}) - check the dotted path") from None
    return found


def call(
    reward: Reward, rows: Sequence[dict[str, Any]], texts: Sequence[str], ids: Sequence[Sequence[int]]
) -> list[float]:
    """Score responses outside a trainer, with the columns that TRL would pass."""
    if not rows:
        return []
    columns = {key: [row.get(key) for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
    prompts = [row["prompt"] for row in rows]
    scores = reward(prompts=prompts, completions=list(texts), completion_ids=[list(row) for row in ids], **columns)
    return [math.nan if score is None else float(score) for score in scores]


def answer_part(text: str, rules: StepRules) -> str | None:
    """The text behind the reasoning; all of it without tags; None if the reasoning was not closed."""
    _, tag, answer = text.rpartition(rules.close_tag)
    if tag:
        return answer.strip()
    return None if rules.open_tag in text else text.strip()


def _each(
    score: Callable[[str, dict[str, Any], StepRules], float],
    rules: StepRules,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Any],
    **columns: Any,
) -> list[float]:
    found = []
    for index, completion in enumerate(completions):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        row = {key: values[index] for key, values in columns.items() if isinstance(values, (list, tuple))}
        opened = rules.open_tag in str(prompts[index])
        found.append(score(f"{rules.open_tag}{text}" if opened and rules.open_tag not in text else text, row, rules))
    return found


def _named(name: str, function: Any) -> Reward:
    """TRL names its metrics after the function."""
    function.__name__ = name
    reward: Reward = function
    return reward


def _exact(text: str, row: dict[str, Any], rules: StepRules) -> float:
    answer = answer_part(text, rules)
    return float(answer is not None and answer == str(row["answer"]).strip())


def _format(text: str, row: dict[str, Any], rules: StepRules) -> float:
    """One closed reasoning and an answer behind it."""
    pattern = rf"\s*{re.escape(rules.open_tag)}.*{re.escape(rules.close_tag)}\s*\S.*"
    return float(text.count(rules.close_tag) == 1 and re.fullmatch(pattern, text, re.DOTALL) is not None)


def _math_verify(text: str, row: dict[str, Any], rules: StepRules) -> float:
    from math_verify import parse, verify

    answer = answer_part(text, rules)
    if not answer:
        return 0.0
    gold = str(row["answer"])
    target = parse(gold if "$" in gold or "\\boxed" in gold else f"${gold}$")
    return float(verify(target, parse(answer)))


def _gym(text: str, row: dict[str, Any], rules: StepRules) -> float:
    import reasoning_gym

    answer = answer_part(text, rules)
    if answer is None:
        return 0.0
    return float(reasoning_gym.get_score_answer_fn(row["gym"])(answer, json.loads(row["entry"])))


_SCORES = {"exact": _exact, "math_verify": _math_verify, "format": _format, "gym": _gym}
_NEEDS = {"math_verify": (("math_verify",), "train"), "gym": (("reasoning_gym",), "gym")}
