"""Merge a PEFT adapter into its base model, and refuse one that belongs to another."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import AdapterMismatchError
from thinkkv.sdk.extras import require
from thinkkv.sdk.model_sources import ALIASES

CONFIG_FILE = "adapter_config.json"


def merge_adapter(model: Any, adapter: Path, *, names: Iterable[str]) -> Any:
    """The model with the adapter's weights folded in; ``model`` itself is used up.

    Args:
        model: the base, as loaded.
        adapter: a PEFT folder.
        names: what the base is called: alias, hub id, folder, file.

    Raises:
        AdapterMismatchError: the folder holds no adapter, or one of another base.
        MissingExtraError: PEFT is not installed.
    """
    require(("peft",), extra="export", purpose="merging an adapter")
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights  # heavy, and part of an extra

    _check_base(adapter, (*names, str(getattr(model.config, "_name_or_path", ""))))
    try:
        saved = set(load_peft_weights(str(adapter), device="cpu"))
        wrapped = PeftModel.from_pretrained(model, str(adapter))
        expected = set(get_peft_model_state_dict(wrapped))
        merged = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # wrong shapes, absent modules, damaged files, not-a-number: each another type
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise AdapterMismatchError(
            f"{adapter} does not fit this model ({reason}) - name its base with --model"
        ) from error
    if saved != expected:
        odd = sorted(saved ^ expected)[0]
        raise AdapterMismatchError(f"{adapter} does not fit this model ({odd}) - name its base with --model")
    return merged


def _check_base(adapter: Path, names: Iterable[str]) -> None:
    """Raise AdapterMismatchError where the adapter names another base."""
    try:
        base = json.loads((adapter / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterMismatchError(
            f"{adapter} is no PEFT adapter (no readable {CONFIG_FILE}) - name the folder that holds it"
        ) from error
    if base and _plain(base) not in {_plain(name) for name in names if name}:
        raise AdapterMismatchError(
            f"the adapter was trained on {base}, not on {next(iter(names))} - use --model {base}, "
            f"or correct its {CONFIG_FILE} where the two are the same model"
        )


def _plain(name: str) -> str:
    """A model's name without folders, file ending, and the suffix of a converted copy."""
    location = ALIASES[name].location if name in ALIASES else name
    last = location.rstrip("/").rpartition("/")[2].lower().removesuffix(".gguf")
    return re.sub(r"-[0-9a-f]{16}$", "", last)
