"""What a cache holds: bytes promised, planned, used and allocated, and the classes of the heads."""

from __future__ import annotations

from dataclasses import dataclass

from thinkkv.sdk.bounded import SEGMENT
from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.layer import HeterogeneousLayer, SequencePlan
from thinkkv.sdk.store import RowGroup


@dataclass(frozen=True)
class Bytes:
    """Bytes of keys and values.

    Args:
        full: if every head kept every token that its window admits, in the model's dtype.
        promised: the budget's share of the prompt, and the tokens appended since.
        planned: what the keep-plans need, and the tokens appended since.
        used: rows in use.
        physical: storage allocated, spare capacity included.
    """

    full: int
    promised: int
    planned: int
    used: int
    physical: int


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Args:
        heterogeneous: KV heads of the first sequence that were classed heterogeneous.
        by_sequence: the same for every sequence of the batch.
        head_scores: per sequence the scores behind the classes (distances, or a profile's), if any.
        used, physical: bytes of this layer.
    """

    heterogeneous: tuple[int, ...]
    by_sequence: tuple[tuple[int, ...], ...]
    head_scores: tuple[tuple[float, ...] | None, ...]
    used: int
    physical: int


@dataclass(frozen=True)
class Report:
    """The state of one cache.

    Args:
        policy: name of the policy.
        bytes: totals over layers and sequences.
        layers: per layer.
        tokens_seen: columns of input seen, padding included.
    """

    policy: str
    bytes: Bytes
    layers: tuple[LayerReport, ...]
    tokens_seen: int


def report(cache: HeterogeneousCache) -> Report:
    """Measure a cache as it stands."""
    layers = cache.layers
    used = [_used(layer) for layer in layers]
    physical = [_physical(layer) for layer in layers]
    return Report(
        policy=cache.compression.policy.name,
        bytes=Bytes(
            full=sum(_full(layer) for layer in layers),
            promised=sum(_promised(layer) for layer in layers),
            planned=sum(_planned(layer) for layer in layers),
            used=sum(used),
            physical=sum(physical),
        ),
        layers=tuple(
            LayerReport(
                heterogeneous=layer.plans[0].heterogeneous if layer.plans else (),
                by_sequence=tuple(plan.heterogeneous for plan in layer.plans),
                head_scores=tuple(plan.head_scores for plan in layer.plans),
                used=used_bytes,
                physical=physical_bytes,
            )
            for layer, used_bytes, physical_bytes in zip(layers, used, physical, strict=True)
        ),
        tokens_seen=cache.get_seq_length(),
    )


def _full(layer: HeterogeneousLayer) -> int:
    tokens = (plan.prompt_tokens + new for plan, new in zip(layer.plans, layer.appended, strict=True))
    entry = 2 * layer.shape.head_dim * layer.store.dtype.itemsize if layer.store else 0
    return entry * layer.shape.kv_heads * sum(layer.shape.visible(count) for count in tokens)


def _promised(layer: HeterogeneousLayer) -> int:
    tokens = (
        layer.compression.promised_tokens(plan.prompt_tokens)[layer.index] + sum(_growth(layer, plan, new))
        for plan, new in zip(layer.plans, layer.appended, strict=True)
    )
    return _entry_bytes(layer) * sum(tokens)


def _planned(layer: HeterogeneousLayer) -> int:
    needs = (_needed(layer, plan, new) for plan, new in zip(layer.plans, layer.appended, strict=True))
    return _entry_bytes(layer) * sum(needs)


def _needed(layer: HeterogeneousLayer, plan: SequencePlan, appended: int) -> int:
    """Tokens of one sequence, over all KV heads, that its plan still needs."""
    window = layer.shape.window
    if window is None:
        return sum(plan.kept_per_head) + sum(_growth(layer, plan, appended))
    oldest = plan.prompt_tokens + appended - window + 1
    kept = sum(int((positions >= oldest).sum()) for positions in plan.in_window)
    return kept + layer.shape.kv_heads * min(appended, window - 1)


def _growth(layer: HeterogeneousLayer, plan: SequencePlan, appended: int) -> list[int]:
    """By how many tokens each KV head has grown since the prompt."""
    if not layer.compression.bounds(layer.index):
        return [appended] * layer.shape.kv_heads
    return [
        appended if head in plan.heterogeneous else _bounded_growth(kept, layer.compression.limit(kept), appended)
        for head, kept in enumerate(plan.kept_per_head)
    ]


def _bounded_growth(kept: int, limit: int, appended: int) -> int:
    """A bounded row grows a segment beyond its limit, is cut back to it, and grows again."""
    over = kept + appended - limit
    return appended if over < SEGMENT else limit + over % SEGMENT - kept


def _used(layer: HeterogeneousLayer) -> int:
    return _entry_bytes(layer) * sum(_live(layer, group) for group in _groups(layer))


def _live(layer: HeterogeneousLayer, group: RowGroup) -> int:
    """Entries that a next query could still see; what a sliding window left behind is spare capacity."""
    if layer.shape.window is None:
        return len(group.index) * group.length
    positions = group.positions()
    return int((positions > group.next_position()[:, None] - layer.shape.window).sum())


def _physical(layer: HeterogeneousLayer) -> int:
    return layer.store.arena.nbytes if layer.store else 0


def _groups(layer: HeterogeneousLayer) -> list[RowGroup]:
    return layer.store.groups if layer.store else []


def _entry_bytes(layer: HeterogeneousLayer) -> int:
    """Bytes of one token's key and value in one KV head, as they are stored."""
    return layer.store.arena.entry_bytes if layer.store else 0
