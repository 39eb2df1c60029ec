"""Which ways of generating a heterogeneous cache cannot serve; each is refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from thinkkv.patches.errors import UnsupportedGenerationError

_REFUSED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "num_beams": ("beam search", lambda value: value not in (None, 1)),
    "num_beam_groups": ("group beam search", lambda value: value not in (None, 1)),
    "constraints": ("constrained beam search", bool),
    "force_words_ids": ("constrained beam search", bool),
    "penalty_alpha": ("contrastive search", bool),
    "dola_layers": ("DoLa decoding", bool),
    "assistant_model": ("assisted generation", lambda value: value is not None),
    "assistant_early_exit": ("assisted generation", bool),
    "prompt_lookup_num_tokens": ("prompt lookup decoding", bool),
    "use_mtp": ("multi-token prediction", bool),
    "prefill_chunk_size": ("chunked prefill", bool),
    "cache_implementation": ("another cache implementation", lambda value: value not in (None, "dynamic")),
}


def setting(name: str, arguments: Mapping[str, Any], defaults: Any) -> Any:
    """What transformers will make of a generation option: the call's, its config object's, or the model's default."""
    if name in arguments:
        return arguments[name]
    value = getattr(arguments.get("generation_config"), name, None)
    return getattr(defaults, name, None) if value is None else value


def check_generation(arguments: Mapping[str, Any], defaults: Any) -> None:
    """Raise UnsupportedGenerationError for a mode that needs to copy, rewind or replace the cache.

    Args:
        arguments: of the call, by name.
        defaults: the model's own generation config.
    """
    for name, (what, is_set) in _REFUSED.items():
        value = setting(name, arguments, defaults)
        if is_set(value):
            refuse(f"{what} ({name}={_short(value)})")


def refuse(what: str) -> NoReturn:
    """Say what a patched model cannot do."""
    raise UnsupportedGenerationError(
        f"a patched model does not support {what} - use greedy search or sampling, or revert() the patch first"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else type(value).__name__
