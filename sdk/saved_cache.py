"""A filled cache in a file: a text is read once, and asked about later, in other processes and on other days.

One safetensors file holds the entries of every layer as they are stored, small ones too, and the decision that made
them: policy, budget and classes of the heads. So a cache goes on as if it had never left the memory, on any model that
is patched, by whatever policy, and is the model that read the text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from thinkkv.patches.architecture import attention_modules
from thinkkv.patches.errors import SavedCacheError
from thinkkv.patches.registry import architecture_of, shapes_of
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.files import whole_file
from thinkkv.sdk.layer import HeterogeneousLayer, SequencePlan, bookkeeping
from thinkkv.sdk.policies import POLICIES, Policy
from thinkkv.sdk.profile import fingerprint_of
from thinkkv.sdk.store import LayerStore, Row

SCHEMA = 1
METADATA = "thinkkv"
"""Key of the file's metadata."""

FINGERPRINT_NUMBERS = 256
"""Of each weight."""

NO_LIMIT = -1
"""Of a row that may grow."""

Tensors = dict[str, torch.Tensor]


def save_cache(
    cache: HeterogeneousCache, path: str | Path, model: nn.Module, about: Mapping[str, Any] | None = None
) -> Path:
    """Write a filled cache, whole or not at all.

    Args:
        cache: goes on as before.
        path: of the file.
        model: that filled it.
        about: JSON of the caller's own, which ``about_cache`` gives back.

    Returns:
        The path.

    Raises:
        SavedCacheError: there is nothing in the cache, its policy is none of thinkkv's, or the file cannot be written.
    """
    policy = cache.compression.policy
    if not cache.get_seq_length() or any(layer.store is None for layer in cache.layers):
        raise SavedCacheError("there is nothing to save in this cache - pass a prompt through the model first")
    if POLICIES.get(policy.name) is not type(policy):
        raise SavedCacheError(
            f"a cache of {type(policy).__name__} cannot be saved - only those of thinkkv's own policies"
        )
    header = {
        "schema": SCHEMA,
        "fingerprint": _fingerprint(model),
        "dtype": str(cache.compression.dtype).removeprefix("torch."),
        "decode": cache.compression.decode,
        "policy": {"name": policy.name, "options": _options(policy)},
        "budget": {"ratio": cache.compression.budget.ratio, "tokens": cache.compression.budget.tokens},
        "seen": cache.get_seq_length(),
        "plans": [[_without_positions(plan) for plan in layer.plans] for layer in cache.layers],
        "about": dict(about or {}),
    }
    tensors = {f"{layer.index}.{name}": part for layer in cache.layers for name, part in _tensors(layer).items()}
    path = Path(path)
    try:
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata={METADATA: json.dumps(header)})
    except (OSError, SafetensorError) as error:
        raise SavedCacheError(f"cannot write {path} ({_reason(error)}) - choose another place") from error
    return path


def check_place(path: str | Path) -> None:
    """Raise SavedCacheError where no file can be written, before any work is done for it."""
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = "is not writable" if folder.is_dir() else "is no folder"
        raise SavedCacheError(f"cannot write {path}: {folder} {why} - choose another place")


def load_cache(path: str | Path, model: nn.Module) -> HeterogeneousCache:
    """Read a cache; it goes on where it was saved.

    Args:
        path: of the file.
        model: that filled it, in the same dtype.

    Raises:
        SavedCacheError: there is no such file, or it is damaged, newer than this thinkkv, or of another model or dtype.
    """
    with _opened(path) as (file, header):
        _check_model(path, header, model)
        cache = HeterogeneousCache(_compression(header, model))
        modules = attention_modules(architecture_of(model.config), model)
        with bookkeeping():
            for layer, module, plans in zip(cache.layers, modules, header["plans"], strict=True):
                device = next(module.parameters()).device
                _fill(layer, {name: part.to(device) for name, part in _read(file, layer.index).items()}, plans)
                layer.seen = header["seen"]
    return cache


def about_cache(path: str | Path) -> dict[str, Any]:
    """What the caller of ``save_cache`` had to say, without reading the cache.

    Raises:
        SavedCacheError: there is no such file, or it is damaged or newer than this thinkkv.
    """
    with _opened(path) as (_, header):
        about: dict[str, Any] = header["about"]
        return about


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The file and its header; what is read of it inside may fail in any way that damage has."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[METADATA])
            if header["schema"] > SCHEMA:
                raise SavedCacheError(
                    f"{path} has schema {header['schema']}, this thinkkv reads up to {SCHEMA} - upgrade thinkkv"
                )
            yield file, header
    except FileNotFoundError:
        raise SavedCacheError(f"there is no file {path} - save a cache there first") from None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise SavedCacheError(f"{path} is no saved cache, or damaged ({_reason(error)}) - save it again") from error


def _fingerprint(model: nn.Module) -> dict[str, Any]:
    """As of a profile, and of numbers from all weights, adapters' too: another fine-tune has other keys and values."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        first = parameter.detach().reshape(-1)[:FINGERPRINT_NUMBERS].contiguous()
        digest.update(first.view(torch.uint8).cpu().numpy().tobytes())
    return fingerprint_of(model) | {"numbers": digest.hexdigest()[:16]}


def _check_model(path: str | Path, header: Mapping[str, Any], model: nn.Module) -> None:
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != header["dtype"]:
        raise SavedCacheError(f"{path} was saved in {header['dtype']}, the model is in {dtype} - load it in that")
    found = _fingerprint(model)
    differing = [key for key in found if header["fingerprint"][key] != found[key]]
    if differing:
        key = differing[0]
        raise SavedCacheError(
            f"{path} is of another model: {key} is {header['fingerprint'][key]!r} there, {found[key]!r} here - "
            "load that model, or let this one read the text"
        )


def _compression(header: Mapping[str, Any], model: nn.Module) -> Compression:
    policy = POLICIES[header["policy"]["name"]](**_hashable(header["policy"]["options"]))
    dtype = getattr(torch, header["dtype"])
    return Compression(policy, Budget(**header["budget"]), shapes_of(model), header["decode"], dtype)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _options(policy: Policy) -> dict[str, Any]:
    """All fields of a policy, a profile's scores too."""
    return {field.name: getattr(policy, field.name) for field in fields(policy)}


def _hashable(value: Any) -> Any:
    """Tuples, which JSON does not have, for lists."""
    if isinstance(value, dict):
        return {name: _hashable(part) for name, part in value.items()}
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _without_positions(plan: SequencePlan) -> dict[str, Any]:
    return {name: value for name, value in vars(plan).items() if name != "in_window"}


def _tensors(layer: HeterogeneousLayer) -> Tensors:
    """All rows of a layer, one behind the other."""
    assert layer.store is not None
    rows = layer.store.rows()
    found = {
        "keys": torch.cat([row.keys for row in rows]),
        "values": torch.cat([row.values for row in rows]),
        "positions": torch.cat([row.positions for row in rows]),
        "lengths": torch.tensor([len(row.positions) for row in rows]),
        "croppable": torch.tensor(layer.croppable),
        "limits": torch.tensor([NO_LIMIT if row.limit is None else row.limit for row in rows]),
        "next_positions": layer.store.next_positions(),
    }
    in_window = [positions for plan in layer.plans for positions in plan.in_window]
    if in_window:
        found["in_window"] = torch.cat(in_window)
    queries = layer.recent_queries.newest()
    return found if queries is None else found | {"recent_queries": queries.contiguous()}


def _read(file: Any, layer: int) -> Tensors:
    """What ``_tensors`` gave of a layer."""
    mine = [name for name in file.keys() if name.startswith(f"{layer}.")]  # noqa: SIM118 - it is no mapping
    return {name.partition(".")[2]: file.get_tensor(name) for name in mine}


def _fill(layer: HeterogeneousLayer, tensors: Tensors, plans: list[dict[str, Any]]) -> None:
    """Undo ``_tensors``."""
    lengths = tensors["lengths"].tolist()
    parts = [tensors[name].split(lengths) for name in ("keys", "values", "positions")]
    limits = [None if limit == NO_LIMIT else limit for limit in tensors["limits"].tolist()]
    rows = [Row(index, *row) for index, row in enumerate(zip(*parts, limits, strict=True))]
    croppable = int(tensors["croppable"])
    layer.store = LayerStore.of_rows(rows, tensors["next_positions"], layer.compression.dtype, appended=croppable)
    layer.plans = tuple(SequencePlan(**_hashable(plan)) for plan in plans)
    if "in_window" in tensors:
        heads = iter(tensors["in_window"].split([kept for plan in layer.plans for kept in plan.kept_per_head]))
        layer.plans = tuple(replace(plan, in_window=(*islice(heads, layer.shape.kv_heads),)) for plan in layer.plans)
    if "recent_queries" in tensors:
        layer.recent_queries.add(tensors["recent_queries"])
    layer.is_initialized = True
