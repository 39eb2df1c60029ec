"""The architectures that thinkkv can patch: registered by name, validated when they are registered."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from thinkkv.patches.architecture import Architecture, LayerShape, check_projections, probe
from thinkkv.patches.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

FAMILIES = ("llama", "qwen", "mistral")
"""Modules beside this one that register the built-in families; a new family adds its name here."""

_architectures: dict[str, Architecture] = {}


def register(architecture: Architecture) -> Architecture:
    """Add a family to the registry.

    Args:
        architecture: its data; ``model_type`` must be known to transformers' ``AutoConfig``.

    Returns:
        The same architecture.

    Raises:
        UnsupportedModelError: the name is taken, or the data does not fit the family's code.
    """
    if architecture.model_type in _architectures:
        raise UnsupportedModelError(
            f"architecture {architecture.model_type!r} is registered already - unregister it first or rename one"
        )
    _check_against_code(architecture)
    _architectures[architecture.model_type] = architecture
    return architecture


def unregister(model_type: str) -> None:
    """Take a family out of the registry; models patched before stay patched."""
    del _architectures[model_type]


def architectures() -> Mapping[str, Architecture]:
    """All registered families by ``model_type``, read-only."""
    _register_families()
    return MappingProxyType(_architectures)


def architecture_of(config: Any) -> Architecture:
    """The family of a model's config.

    Raises:
        UnsupportedModelError: it is not registered; the message lists those that are.
    """
    known = architectures()
    if config.model_type not in known:
        raise UnsupportedModelError(
            f"no patch for architecture {config.model_type!r} - supported: {', '.join(sorted(known))}; "
            "docs/architectures.md shows how to add one"
        )
    return known[config.model_type]


def shapes_of(model: nn.Module) -> tuple[LayerShape, ...]:
    """The attention geometry of every layer of a model.

    Raises:
        UnsupportedModelError: its family is not registered, or it does not look like it.
    """
    config: Any = model.config
    return probe(architecture_of(config), model)


def _register_families() -> None:
    # Importing a family registers it; done on first use because it loads the family's modeling code.
    for family in FAMILIES:
        importlib.import_module(f"thinkkv.patches.{family}")


def _check_against_code(architecture: Architecture) -> None:
    """Build one attention module without memory for its weights and look for what the data promises."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        module = importlib.import_module(architecture.modeling_module)
    except ImportError as error:
        raise UnsupportedModelError(f"{error} - correct the module of {architecture.model_type!r}") from None
    if architecture.model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"AutoConfig knows no {architecture.model_type!r} - AutoConfig.register it first")
    attention = getattr(module, architecture.attention, None)
    if attention is None:
        raise UnsupportedModelError(
            f"{architecture.modeling_module} has no class {architecture.attention} - correct the entry of "
            f"{architecture.model_type!r}"
        )
    config = AutoConfig.for_model(architecture.model_type)
    with torch.device("meta"):
        check_projections(architecture, attention(config, layer_idx=0))
    architecture.sliding_window(config, 0)
