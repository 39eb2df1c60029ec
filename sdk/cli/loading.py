"""Loading a model as all commands do: fetched with its own bar, then loaded with a note of how long it took."""

from __future__ import annotations

from typing import Any

from thinkkv.sdk.cli.console import progress


def load(model: str, dtype: str | None) -> tuple[Any, Any]:
    """Model and tokenizer.

    Args:
        model: alias, hub id, folder or file.
        dtype: of the weights; None for the checkpoint's own.
    """
    from thinkkv.sdk import model_sources, models  # heavy: not for a help text

    source = model_sources.resolve(model)
    model_sources.fetch(source)
    with progress(f"loading {source.label}"):
        return models.load(model, dtype=dtype)
