"""Give a model per-head cache budgets, and take them away again.

A patch is reversible things on one model instance: the attention implementation's name in its config, a hook on the
decoder that supplies a cache where the caller passed none, ``generate`` wrapped to supply one and to refuse what such a
cache cannot do, and on a CPU linear layers that compute few rows faster. Where steps are to be compiled, the instance's
forward is wrapped too. No class, no other model and nothing of a forward's code is touched.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from thinkkv.kernels.dispatch import KernelError, choose
from thinkkv.patches.architecture import LayerShape
from thinkkv.patches.errors import (
    BudgetError,
    PatchStateError,
    ThinkKVError,
    UnsupportedGenerationError,
    UnsupportedModelError,
)
from thinkkv.patches.registry import shapes_of
from thinkkv.sdk.attention import NAME, register_attention
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.compiled import CompiledStep, inductor
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.generation import check_generation, refuse, setting
from thinkkv.sdk.linear_layers import LinearLayers
from thinkkv.sdk.policies import CacheDtype, Full, Policy, policy_named
from thinkkv.sdk.profile import HeadProfile
from thinkkv.sdk.rehearsal import rehearse
from thinkkv.sdk.report import Report, report
from thinkkv.sdk.saved_cache import load_cache, save_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HANDLE = "_thinkkv_handle"
"""Attribute of a patched model that holds its handle."""

DEFAULT_RATIO = 0.4


def apply(
    model: nn.Module,
    *,
    policy: str | Policy | None = None,
    ratio: float | None = None,
    budget: int | None = None,
    profile: HeadProfile | str | Path | None = None,
    decode: Literal["append", "bounded"] = "append",
    cache_dtype: CacheDtype | None = None,
    compiled: bool | str = False,
) -> PatchHandle:
    """Patch a model: from now on it caches what the policy keeps.

    Args:
        model: a transformers causal LM of a registered architecture, also wrapped by PEFT; in training mode it is
            patched too, and the patch takes effect when it is used for inference.
        policy: name or object; default ``task-kv``, or what the profile was calibrated for.
        ratio: share of the prompt's full cache to keep, default 0.4.
        budget: instead of a ratio: tokens per KV head on average.
        profile: fixes which heads are heterogeneous instead of telling them apart per prompt; object or folder.
        decode: ``append`` every new token to every head, or keep the heads that are not heterogeneous ``bounded``.
        cache_dtype: ``int8`` stores tokens in about half the bytes of 16-bit numbers, ``k8v5`` and ``k8v4`` (keys in
            int8, values in five or four bits) in 44 and 41 % of them at a head dimension of 64, so that a ratio keeps
            as many more; default what the policy says, which is ``model``.
        compiled: whether to compile steps of one new token (``sdk/compiled.py``): the first takes about a minute, the
            others are faster; or the name of another ``torch.compile`` backend than inductor.

    Returns:
        A handle that reports and reverts; also a context manager that reverts at its end.

    Raises:
        UnsupportedModelError: unknown architecture; the message lists the supported ones.
        BudgetError: an impossible ratio, budget, cache dtype or policy name.
        ProfileMismatchError: the profile is damaged or of another model.
        PatchStateError: the model is patched already.
        UnsupportedGenerationError: bounded decoding cannot be compiled.
        ThinkKVError: the kernels that the environment asks for cannot run here.
    """
    if decode not in ("append", "bounded"):
        raise BudgetError(f"no decode mode {decode!r} - choose append or bounded")
    if compiled and decode == "bounded":
        raise UnsupportedGenerationError(
            "bounded decoding re-selects tokens between steps, which is not compiled - use decode='append'"
        )
    target = _unwrapped(model)
    if HANDLE in target.__dict__:
        current = target.__dict__[HANDLE].policy.name
        raise PatchStateError(f"the model is patched with {current} already - revert() that handle first")
    shapes = shapes_of(target)
    try:
        choose(target.device)
    except KernelError as error:
        raise ThinkKVError(str(error)) from None
    if isinstance(profile, (str, Path)):
        profile = HeadProfile.load(profile)
    chosen = _resolve_policy(policy, profile, cache_dtype)
    if profile is not None:
        profile.check(target)
        chosen = profile.fix(chosen)
    compression = Compression(chosen, _resolve_budget(chosen, ratio, budget), shapes, decode, target.dtype)
    return PatchHandle(target, compression, inductor if compiled is True else compiled or None)


class PatchHandle:
    """A patch in force on one model.

    Attributes:
        compression: policy, budget and attention geometry together, which its caches follow.
        policy: the policy.
        budget: the promise.
        shapes: attention geometry per layer.
        active: False after ``revert``.
    """

    def __init__(
        self, model: PreTrainedModel, compression: Compression, backend: str | Callable[..., Any] | None = None
    ) -> None:
        self._model = model
        self._backend = backend
        self.compression = compression
        self._latest: weakref.ref[HeterogeneousCache] | None = None
        self._snapshot: Report | None = None
        self.active = False
        self._install()

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.compression.policy

    @property
    def budget(self) -> Budget:
        """The promise in force."""
        return self.compression.budget

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """Attention geometry per layer."""
        return self.compression.shapes

    def new_cache(self) -> HeterogeneousCache:
        """An empty cache, to be passed as ``past_key_values`` and kept over several turns."""
        cache = HeterogeneousCache(self.compression)
        self._latest, self._snapshot = weakref.ref(cache), None
        return cache

    def save_cache(self, path: str | Path, cache: HeterogeneousCache, about: Mapping[str, Any] | None = None) -> Path:
        """Write a filled cache to a file, to go on with it later: ``thinkkv.sdk.saved_cache``.

        Args:
            path: of the file, which is written whole or not at all.
            cache: of this model; it goes on as before.
            about: JSON of the caller's own, which ``saved_cache.about_cache`` gives back.

        Raises:
            SavedCacheError: there is nothing to save, or no place for it.
        """
        return save_cache(cache, path, self._model, about)

    def load_cache(self, path: str | Path) -> HeterogeneousCache:
        """A cache that was saved, with the policy, the budget and the dtype that it had; whatever this patch has.

        Raises:
            SavedCacheError: there is none, or it is damaged or of another model.
        """
        cache = load_cache(path, self._model)
        self._latest, self._snapshot = weakref.ref(cache), None
        return cache

    def report(self, cache: HeterogeneousCache | None = None) -> Report:
        """What a cache holds.

        Args:
            cache: default: the newest cache of this model, as it is, or as ``generate`` left it.

        Raises:
            PatchStateError: nothing has been cached yet, or the cache is gone.
        """
        if cache is not None:
            return report(cache)
        newest = self._latest() if self._latest else None
        if newest is not None and newest.get_seq_length():
            return report(newest)
        if self._snapshot is None:
            raise PatchStateError("no cache to report on - generate first, or keep the model's past_key_values alive")
        return self._snapshot

    def revert(self) -> None:
        """Restore the model as it was before ``apply``; doing it again changes nothing."""
        if not self.active:
            return
        self.active = False
        for hook in self._hooks:
            hook.remove()
        self._linear_layers.restore()
        for name in (*self._installed, HANDLE):
            del self._model.__dict__[name]
        vars(self._model).update(self._shadowed)
        self._model.set_attn_implementation(self._previous_attention)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def _install(self) -> None:
        register_attention()
        model = self._model
        self._previous_attention = model.config._attn_implementation
        if self._previous_attention == NAME:
            raise PatchStateError(
                "the model shares its config object with a patched model - give each model a config of its own "
                "(copy.deepcopy(config))"
            )
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:  # transformers only logs that it cannot
            raise UnsupportedModelError(
                f"the attention of {type(model).__name__} cannot be exchanged - its class must attend "
                "through transformers' AttentionInterface"
            )
        self._linear_layers = LinearLayers(model)
        # Bound methods, so that a deep copy of the model is patched on its own.
        self._hooks = [model.base_model.register_forward_pre_hook(self._supply_cache, with_kwargs=True)]
        if self.policy.compares_layers:
            self._hooks.append(model.base_model.register_forward_hook(self._compress_held, with_kwargs=True))
        installed: dict[str, Any] = {
            "generate": MethodType(_generate, model),
            "generate_batch": MethodType(_refuse_batching, model),
        }
        if self._backend is not None:
            installed["forward"] = CompiledStep(model, self._backend)
        self._installed = tuple(installed)
        self._shadowed = {name: vars(model)[name] for name in installed if name in vars(model)}
        vars(model).update(installed | {HANDLE: self})
        self.active = True

    def _supply_cache(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give a direct forward call the cache that it would otherwise create itself."""
        given = _bound(decoder.forward, args, kwargs)
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = decoder.config.use_cache  # type: ignore[union-attr]
        if decoder.training or not use_cache or given.get("past_key_values") is not None:
            return None
        return (), given | {"past_key_values": self.new_cache()}

    def _compress_held(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Compress prompts that the forward has just left in the cache, perhaps after a second reading."""
        if torch.compiler.is_compiling():
            return  # a step: its prompt is compressed already
        given = _bound(decoder.forward, args, kwargs)
        cache = given.get("past_key_values")
        if isinstance(cache, HeterogeneousCache) and cache.held:
            if self.policy.rehearses and any(map(cache.compression.compresses, cache.held[0].lengths)):
                rehearse(decoder, given, cache, held_queries=self.policy.reread_queries, shuffled=self.policy.shuffles)
            cache.compress(cache.held)


def _bound(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    given = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    return given | given.pop("kwargs", {})


def _generate(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of a patched model: the same call, a cache of ours, and a report afterwards."""
    handle: PatchHandle = model.__dict__[HANDLE]
    unpatched = handle._shadowed.get("generate") or MethodType(type(model).generate, model)  # type: ignore[attr-defined]
    given = _bound(unpatched, args, kwargs)
    check_generation(given, model.generation_config)
    cache = given.get("past_key_values")
    if cache is None and setting("use_cache", given, model.generation_config) is not False:
        cache = kwargs["past_key_values"] = handle.new_cache()
        if setting("cache_implementation", given, model.generation_config) is not None:
            kwargs["cache_implementation"] = None  # "dynamic", which transformers refuses beside a cache
    try:
        return unpatched(*args, **kwargs)
    finally:
        if isinstance(cache, HeterogeneousCache) and cache.get_seq_length():
            handle._latest, handle._snapshot = weakref.ref(cache), report(cache)


def _refuse_batching(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    refuse("continuous batching (generate_batch)")


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    from transformers import PreTrainedModel

    inner: Any = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model - pass what AutoModelForCausalLM loads, or PEFT around it"
        )
    return inner


def _resolve_policy(policy: str | Policy | None, profile: HeadProfile | None, cache_dtype: CacheDtype | None) -> Policy:
    if cache_dtype not in (None, *get_args(CacheDtype)):
        raise BudgetError(f"no cache dtype {cache_dtype!r} - choose {', '.join(get_args(CacheDtype))}")
    chosen = (
        policy if isinstance(policy, Policy) else policy_named(policy or (profile.policy if profile else "task-kv"))
    )
    return chosen if cache_dtype is None else replace(chosen, cache_dtype=cache_dtype)


def _resolve_budget(policy: Policy, ratio: float | None, tokens: int | None) -> Budget:
    if isinstance(policy, Full):
        return Budget(ratio=1.0)
    if tokens is None:
        return Budget(ratio=DEFAULT_RATIO if ratio is None else ratio)
    if ratio is not None:
        raise BudgetError(f"both ratio {ratio:g} and budget {tokens} were given - choose one")
    return Budget(tokens=tokens)
