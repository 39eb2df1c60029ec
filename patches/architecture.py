"""What thinkkv must know of a model family: data, and a probe that holds it against a real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from thinkkv.patches.errors import UnsupportedModelError

WindowRule = Callable[[Any, int], int | None]
"""(config, layer index) -> sliding window of that layer in tokens, or None for full attention."""


def no_window(config: Any, layer: int) -> int | None:
    """Every layer attends to everything."""
    return None


def uniform_window(key: str) -> WindowRule:
    """All layers share the window at ``config.<key>`` (Mistral)."""
    return lambda config, layer: getattr(config, key, None)


def per_layer_window(key: str) -> WindowRule:
    """The layers that ``config.layer_types`` calls sliding use ``config.<key>`` (Qwen)."""

    def rule(config: Any, layer: int) -> int | None:
        sliding = config.layer_types[layer] == "sliding_attention"
        return getattr(config, key) if sliding else None

    return rule


@dataclass(frozen=True)
class Projections:
    """Attribute names of an attention module's weights; the norms are None where a family has none."""

    q: str
    k: str
    v: str
    o: str
    q_norm: str | None = None
    k_norm: str | None = None

    def names(self) -> tuple[str, ...]:
        """The names that the family really has."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(name for name in values if name is not None)


@dataclass(frozen=True)
class Architecture:
    """One model family as data.

    Args:
        model_type: ``config.model_type`` of the family.
        attention: class name of its attention module.
        projections: where that module keeps its weights.
        sliding_window: which layers see only a window.
        module: Python module that defines the attention class; by default the one in transformers.
    """

    model_type: str
    attention: str
    projections: Projections
    sliding_window: WindowRule = no_window
    module: str | None = None

    @property
    def modeling_module(self) -> str:
        """Dotted name of the module that defines the attention class."""
        return self.module or f"transformers.models.{self.model_type}.modeling_{self.model_type}"


@dataclass(frozen=True)
class LayerShape:
    """Attention geometry of one layer.

    Args:
        query_heads, kv_heads, head_dim: counts and size.
        window: sliding window in tokens, None for full attention.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    window: int | None

    @property
    def query_group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    def visible(self, tokens: int) -> int:
        """How many of ``tokens`` seen tokens the next query may still attend to."""
        return tokens if self.window is None else min(tokens, self.window - 1)


def attention_modules(architecture: Architecture, model: nn.Module) -> list[nn.Module]:
    """The model's attention modules in layer order."""
    found = [m for m in model.modules() if type(m).__name__ == architecture.attention]
    return sorted(found, key=lambda module: int(module.layer_idx))  # type: ignore[arg-type]


def probe(architecture: Architecture, model: nn.Module) -> tuple[LayerShape, ...]:
    """Measure every attention layer of ``model`` and hold it against the registered data.

    Returns:
        One shape per layer.

    Raises:
        UnsupportedModelError: the model does not look like its family.
    """
    config: Any = model.config
    layers = attention_modules(architecture, model)
    if [module.layer_idx for module in layers] != list(range(config.num_hidden_layers)):
        raise UnsupportedModelError(
            f"found {len(layers)} modules of class {architecture.attention} for {config.num_hidden_layers} layers of a "
            f"{architecture.model_type} model - register the architecture that this model really has"
        )
    return tuple(_layer_shape(architecture, config, module) for module in layers)


def _layer_shape(architecture: Architecture, config: Any, module: nn.Module) -> LayerShape:
    check_projections(architecture, module)
    names = architecture.projections
    head_dim = int(module.head_dim)  # type: ignore[arg-type]
    # Asked of the weights, not of the config: a pruned model may differ from what its config says.
    queries, keys = (_out_features(getattr(module, name)) for name in (names.q, names.k))
    if queries % head_dim or keys % head_dim or queries % keys:
        raise UnsupportedModelError(
            f"layer {module.layer_idx} projects to {queries} query and {keys} key features, which head_dim {head_dim} "
            "does not divide into query groups - this model needs an architecture of its own"
        )
    window = architecture.sliding_window(config, int(module.layer_idx))  # type: ignore[arg-type]
    return LayerShape(queries // head_dim, keys // head_dim, head_dim, window)


def check_projections(architecture: Architecture, module: nn.Module) -> None:
    """Raise UnsupportedModelError where the attention module lacks a declared weight."""
    missing = [
        name for name in architecture.projections.names() if not isinstance(getattr(module, name, None), nn.Module)
    ]
    if missing:
        raise UnsupportedModelError(
            f"{architecture.attention} has no {', '.join(missing)} - "
            f"correct the projections of {architecture.model_type!r}"
        )


def _out_features(projection: nn.Module) -> int:
    # LoRA wraps a projection and keeps the original as base_layer; its own attribute passes through.
    return int(projection.out_features)  # type: ignore[arg-type]
