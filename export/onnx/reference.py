"""``ai.thinkkv::TaskKVAttention`` in numpy, for ``onnx.reference``: what the graph must compute, in plain steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from thinkkv.export.onnx.operator import DOMAIN

Array = np.ndarray[Any, Any]


class TaskKVAttention(OpRun):
    """The operator; its inputs and attributes are those of docs/onnx-operator.md."""

    op_domain = DOMAIN

    def _run(
        self,
        query: Array,
        key: Array,
        value: Array,
        past_key: Array,
        past_value: Array,
        position_ids: Array,
        last_slot: Array,
        slots_in_use: Array,
        write_slot: Array,
        cos_cache: Array,
        sin_cache: Array,
        num_heads: int,
        kv_num_heads: int,
        scale: float,
        sinks: int,
        middle: int,
        observation_window: int,
        pooling: list[int],
    ) -> tuple[Array, Array, Array]:
        capacity = past_key.shape[2]
        positions = position_ids[0]
        queries = _rotated(_by_head(query, num_heads), positions, cos_cache, sin_cache)
        keys = _rotated(_by_head(key, kv_num_heads), positions, cos_cache, sin_cache)
        values = _by_head(value, kv_num_heads)
        ring = max(capacity - sinks - middle, 1)

        if len(positions) == 1:
            present_key, present_value = past_key[0].copy(), past_value[0].copy()
            slot = int(write_slot[0])
            present_key[:, slot], present_value[:, slot] = keys[:, 0], values[:, 0]
            used = int(slots_in_use)
            output = _attention(queries, present_key[:, :used], present_value[:, :used], scale)
            return _flat(output, query.dtype), present_key[None], present_value[None]

        past = int(positions[0])
        order = _oldest_first(past, capacity, sinks + middle, ring)
        keys = np.concatenate([past_key[0][:, order], keys], axis=1)
        values = np.concatenate([past_value[0][:, order], values], axis=1)
        output = _attention(queries, keys, values, scale)
        entries = keys.shape[1]
        present_key, present_value = past_key[0].copy(), past_value[0].copy()
        if entries <= capacity:
            present_key[:, :entries], present_value[:, :entries] = keys, values
        else:
            scores = _window_scores(queries[:, -observation_window:], keys, scale)
            seen = past + len(positions)
            for head, row in enumerate(scores):
                chosen = _chosen(row, entries, seen, sinks, middle, ring, pooling[0])
                present_key[head], present_value[head] = keys[head, chosen], values[head, chosen]
        return _flat(output, query.dtype), present_key[None], present_value[None]


def _by_head(packed: Array, heads: int) -> Array:
    """[1, n, H*D] to [H, n, D]."""
    return packed[0].reshape(packed.shape[1], heads, -1).swapaxes(0, 1)


def _flat(output: Array, dtype: Any) -> Array:
    """[H, n, D] to [1, n, H*D]."""
    return output.swapaxes(0, 1).reshape(1, output.shape[1], -1).astype(dtype)


def _rotated(states: Array, positions: Array, cos_cache: Array, sin_cache: Array) -> Array:
    """Rotary embedding of [H, n, D], the two halves of a head as real and imaginary parts."""
    cos, sin = cos_cache[positions], sin_cache[positions]
    real, imaginary = np.split(states, 2, axis=-1)
    return np.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)


def _attention(queries: Array, keys: Array, values: Array, scale: float) -> Array:
    """Softmax attention; the queries belong to the last entries and see those up to their own."""
    group, new, entries = len(queries) // len(keys), queries.shape[1], keys.shape[1]
    logits = queries @ keys.repeat(group, 0).swapaxes(1, 2) * scale
    if new > 1:
        future = np.arange(entries)[None] > np.arange(entries - new, entries)[:, None]
        logits = np.where(future, -np.inf, logits)
    return _softmax(logits) @ values.repeat(group, 0)


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _oldest_first(past: int, capacity: int, fixed: int, ring: int) -> Array:
    """Slots in the order of their tokens: the ring begins with its oldest."""
    if past <= capacity:
        return np.arange(past)
    return np.concatenate([np.arange(fixed), fixed + (past - fixed + np.arange(ring)) % ring])


def _window_scores(queries: Array, keys: Array, scale: float) -> Array:
    """[h, T]: mean attention of the last queries, averaged over each group."""
    group, window, entries = len(queries) // len(keys), queries.shape[1], keys.shape[1]
    logits = queries @ keys.repeat(group, 0).swapaxes(1, 2) * scale
    future = np.arange(entries)[None] > np.arange(entries - window, entries)[:, None]
    weights = _softmax(np.where(future, -np.inf, logits)).mean(1)
    return weights.reshape(len(keys), group, entries).mean(1)


def _chosen(scores: Array, entries: int, seen: int, sinks: int, middle: int, ring: int, pooling: int) -> Array:
    """Entries of one head in the order of the slots that they go to."""
    between = np.pad(scores[sinks : entries - ring], pooling // 2)
    pooled = np.convolve(between, np.full(pooling, 1 / pooling), mode="valid")
    best = np.sort(np.argsort(-pooled, kind="stable")[:middle]) + sinks
    recent = np.empty(ring, dtype=np.int64)
    for entry in range(entries - ring, entries):
        position = seen - (entries - entry)
        recent[(position - sinks - middle) % ring] = entry
    return np.concatenate([np.arange(sinks), best, recent])
