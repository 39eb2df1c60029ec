"""The operators of ``ai.thinkkv`` in numpy, for ``onnx.reference``: what the graph must compute, in plain steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from thinkkv.export.onnx.domain import DOMAIN

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
        held: Array,
        slots_in_use: Array,
        last_slot: Array,
        appends: Array,
        steps: Array,
        cos_cache: Array,
        sin_cache: Array,
        num_heads: int,
        kv_num_heads: int,
        full_num_heads: int,
        full_kv_num_heads: int,
        scale: float,
        sinks: int,
        middle: int,
        stride: int,
        observation_window: int,
        pooling: list[int],
    ) -> tuple[Array, Array, Array]:
        positions, past, used = position_ids[0], int(held[0]), int(slots_in_use[0])
        queries = _rotated(_by_head(query, num_heads), positions, cos_cache, sin_cache)
        keys = _rotated(_by_head(key, kv_num_heads), positions, cos_cache, sin_cache)
        keys = _appended(past_key[0][:, :past], keys)
        values = _appended(past_value[0][:, :past], _by_head(value, kv_num_heads))
        entries, fixed = keys.shape[1], sinks + middle
        present_key, present_value = past_key[0].copy(), past_value[0].copy()
        everything = np.arange(entries)
        if entries == used:
            chosen = np.tile(everything, (kv_num_heads, 1))
        elif len(positions) == 1:
            chosen = np.tile(np.delete(everything, slice(fixed, fixed + stride)), (kv_num_heads, 1))
        else:
            scores = _window_scores(queries[:, -observation_window:], keys, scale)
            chosen = np.stack([_chosen(row, sinks, middle, used - fixed, pooling[0]) for row in scores])
        for head, row in enumerate(chosen):
            present_key[head, :used], present_value[head, :used] = keys[head, row], values[head, row]
        if len(positions) == 1:  # what goes is gone before this token attends, what a prompt loses only after it
            keys, values = (cache[:, :used].astype(query.dtype) for cache in (present_key, present_value))
        output = _attention(queries, keys, values, scale)
        return _flat(output, query.dtype), present_key[None], present_value[None]


class FullKVAttention(OpRun):
    """The operator; its inputs and attributes are those of docs/onnx-operator.md."""

    op_domain = DOMAIN

    def _run(
        self,
        query: Array,
        key: Array,
        value: Array,
        past_key: Array,
        past_value: Array,
        seqlens_k: Array,
        total_sequence_length: Array,
        position_ids: Array,
        write_slot: Array,
        mask: Array,
        blocks: Array,
        by_products: Array,
        cos_cache: Array,
        sin_cache: Array,
        num_heads: int,
        kv_num_heads: int,
        scale: float,
    ) -> tuple[Array, Array, Array]:
        positions, total = position_ids[0], int(total_sequence_length)
        queries = _rotated(_by_head(query, num_heads), positions, cos_cache, sin_cache)
        keys = _rotated(_by_head(key, kv_num_heads), positions, cos_cache, sin_cache)
        present_key, present_value = past_key.copy(), past_value.copy()
        new = slice(total - len(positions), total)
        present_key[0, :, new], present_value[0, :, new] = keys, _by_head(value, kv_num_heads)
        keys, values = (cache[0, :, :total].astype(query.dtype) for cache in (present_key, present_value))
        output = _attention(queries, keys, values, scale)
        return _flat(output, query.dtype), present_key, present_value


def _appended(held: Array, new: Array) -> Array:
    """[h, entries, D]: what a cache holds, and new states as it holds them."""
    return np.concatenate([held, new.astype(held.dtype)], axis=1).astype(new.dtype)


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


def _window_scores(queries: Array, keys: Array, scale: float) -> Array:
    """[h, T]: mean attention of the last queries, averaged over each group."""
    group, window, entries = len(queries) // len(keys), queries.shape[1], keys.shape[1]
    logits = queries @ keys.repeat(group, 0).swapaxes(1, 2) * scale
    future = np.arange(entries)[None] > np.arange(entries - window, entries)[:, None]
    weights = _softmax(np.where(future, -np.inf, logits)).mean(1)
    return weights.reshape(len(keys), group, entries).mean(1)


def _chosen(scores: Array, sinks: int, middle: int, recent: int, pooling: int) -> Array:
    """Entries that one head keeps, ascending."""
    entries = np.arange(len(scores))
    between = np.pad(scores[sinks : len(scores) - recent], pooling // 2)
    pooled = np.convolve(between, np.full(pooling, 1 / pooling), mode="valid")
    best = np.sort(np.argsort(-pooled, kind="stable")[:middle]) + sinks
    return np.concatenate([entries[:sinks], best, entries[len(scores) - recent :]])
