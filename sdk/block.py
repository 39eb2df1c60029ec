"""The ``thinkkv`` block: what an exported model says about its head classes, budget and origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from thinkkv.sdk.bundle_json import read_bundle_json

BLOCK_FILE = "thinkkv.json"
SCHEMA = 1


@dataclass(frozen=True)
class LayerClasses:
    """One layer of a baked model.

    Args:
        full: its first KV heads, so many, keep every token; the others keep a bounded number.
        kv_heads, query_heads, head_dim: its geometry.
        order: for every KV head, its index in the source model.
        window: its sliding window in tokens, None for full attention.
    """

    full: int
    kv_heads: int
    query_heads: int
    head_dim: int
    order: tuple[int, ...]
    window: int | None = None


@dataclass(frozen=True)
class Block:
    """What was baked.

    Args:
        policy: name of the cache policy.
        options: its options that are numbers or words; a profile's scores stand in ``profile.json``.
        ratio, budget: the promise: a share of the full cache, or tokens per KV head; one of them is None.
        context: prompt length at which classes and ``kept`` were counted; the ratio of a fixed-size cache refers to it.
        kept: tokens that every other head keeps of such a prompt.
        layers: classes and geometry per layer.
        calibration: prompts and hash behind the classes; None without a profile.
        source: label and fingerprint of the base model, and the adapter merged into it.
        version: of thinkkv.
        schema: of this block.
    """

    policy: str
    options: Mapping[str, Any]
    ratio: float | None
    budget: int | None
    context: int
    kept: int
    layers: tuple[LayerClasses, ...]
    calibration: Mapping[str, Any] | None
    source: Mapping[str, Any]
    version: str
    schema: int = SCHEMA

    def as_json(self) -> dict[str, Any]:
        """As it stands in files."""
        return asdict(self)

    @property
    def heterogeneous(self) -> list[list[int]]:
        """Per layer the KV heads that keep everything, in the baked order."""
        return [list(range(layer.full)) for layer in self.layers]

    @classmethod
    def read(cls, folder: Path) -> Block:
        """The block of an exported folder.

        Raises:
            BundleError: there is none, or it is damaged or of a newer schema.
        """
        return read_bundle_json(folder / BLOCK_FILE, SCHEMA, cls._of_json)

    @classmethod
    def _of_json(cls, content: Any) -> Block:
        known = {field.name: content[field.name] for field in fields(cls)}
        layers = tuple(LayerClasses(**{**layer, "order": tuple(layer["order"])}) for layer in content["layers"])
        return cls(**{**known, "layers": layers})
