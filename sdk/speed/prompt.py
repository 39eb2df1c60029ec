"""The prompt of a speed measurement: real text of any number of tokens."""

from __future__ import annotations

from typing import Any

from thinkkv.sdk.evaluation.tasks.perplexity import builtin_text


def prompt_ids(tokenizer: Any, context: int) -> list[int]:
    """Token ids of the built-in texts, over and over where the context is longer."""
    ids: list[int] = tokenizer(builtin_text()).input_ids
    return (ids * (context // len(ids) + 1))[:context]
