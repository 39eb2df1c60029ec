"""Bake: merge an adapter, put the heterogeneous KV heads of every layer first, and note what was decided.

The order of KV heads means nothing to a model as long as the query heads that read them and the columns of the output
projection move along, so the dense logits stay what they were. With the full heads first, a cache splits into two
contiguous groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thinkkv.export.adapter import merge_adapter
from thinkkv.patches.architecture import LayerShape, attention_modules
from thinkkv.patches.errors import ExportError
from thinkkv.patches.registry import architecture_of, shapes_of
from thinkkv.sdk.block import Block, LayerClasses
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.plan import KeepPlan, PromptView
from thinkkv.sdk.policies import Full, Policy
from thinkkv.sdk.policies.sinks_middle_recent import SinksMiddleRecent
from thinkkv.sdk.profile import HeadProfile, fingerprint_of

LONGEST_DEFAULT_CONTEXT = 8192
"""Prompt length that a budget refers to, for models with a longer context, unless the caller says otherwise."""


@dataclass(frozen=True)
class Baked:
    """A model ready to be written.

    Args:
        model: merged and permuted.
        tokenizer: its tokenizer.
        profile: the head profile in the new order; None where the policy has no classes.
        block: what was decided.
    """

    model: Any
    tokenizer: Any
    profile: HeadProfile | None
    block: Block


def bake(
    model: Any,
    tokenizer: Any,
    *,
    policy: Policy,
    budget: Budget,
    profile: HeadProfile | None = None,
    adapter: Path | None = None,
    context: int | None = None,
    label: str = "",
    location: str = "",
) -> Baked:
    """Merge, classify and permute.

    Args:
        model: a causal LM as loaded; its weights are changed in place.
        tokenizer: its tokenizer.
        policy: decides the classes; one that needs a profile has it fixed already or gets it from ``profile``.
        budget: the promise.
        profile: calibrated on this model, before the adapter.
        adapter: PEFT folder to merge.
        context: prompt length that the budget refers to; default the model's context, at most 8,192.
        label, location: the model's name, and where it was found.

    Raises:
        ExportError: the policy has no classes that could be fixed, or stores its cache in another dtype.
        AdapterMismatchError: the adapter belongs to another model.
        ProfileMismatchError: so does the profile.
        BudgetError: the budget cannot be met.
    """
    if policy.stored:
        raise ExportError("an exported model's cache is stored as its runtime does it - bake without cache_dtype")
    shapes = shapes_of(model)
    if profile is not None:
        profile.check(model)
        policy = profile.fix(policy)
    source = {
        "label": label,
        "fingerprint": fingerprint_of(model),
        "adapter": str(adapter) if adapter else None,
    }
    context = context or min(model.config.max_position_embeddings, LONGEST_DEFAULT_CONTEXT)
    plans = _plans(Compression(policy, budget, shapes), context)
    if adapter is not None:
        model = merge_adapter(model, adapter, names=(label, location))
    classes = profile.heterogeneous if profile else tuple(plan.heterogeneous for plan in plans)
    full = [_full(plan, shape.visible(context)) for plan, shape in zip(plans, shapes, strict=True)]
    orders = [
        _full_first(whole, heterogeneous, shape.kv_heads)
        for whole, heterogeneous, shape in zip(full, classes, shapes, strict=True)
    ]
    permute_heads(model, orders, shapes)
    block = Block(
        policy=policy.name,
        options=policy.options,
        ratio=budget.ratio,
        budget=budget.tokens,
        context=context,
        kept=_kept_by_others(plans, shapes, context),
        layers=tuple(
            LayerClasses(len(heads), shape.kv_heads, shape.query_heads, shape.head_dim, order, shape.window)
            for heads, shape, order in zip(full, shapes, orders, strict=True)
        ),
        calibration=dict(profile.calibration) if profile else None,
        source=source,
        version=version("thinkkv"),
    )
    return Baked(model, tokenizer, profile and _reordered(profile, orders, model, shapes), block)


def permute_heads(model: nn.Module, orders: Sequence[Sequence[int]], shapes: Sequence[LayerShape]) -> None:
    """Reorder the KV heads of every layer, and with them the query heads that read them.

    Args:
        model: changed in place: rows and biases of q, k and v, columns of o.
        orders: per layer, for every new KV head its old index.
        shapes: geometry per layer.
    """
    architecture: Any = architecture_of(model.config)
    names = architecture.projections
    for module, order, shape in zip(attention_modules(architecture, model), orders, shapes, strict=True):
        if list(order) == list(range(shape.kv_heads)):
            continue
        for name, width in (
            (names.q, shape.query_group * shape.head_dim),
            (names.k, shape.head_dim),
            (names.v, shape.head_dim),
        ):
            projection: Any = getattr(module, name)
            for parameter in (projection.weight, projection.bias):
                if parameter is not None:
                    rows = parameter.data.unflatten(0, (shape.kv_heads, width))
                    parameter.data = rows[list(order)].flatten(0, 1).contiguous()
        output: Any = getattr(module, names.o)
        columns = output.weight.data.unflatten(1, (shape.kv_heads, shape.query_group * shape.head_dim))
        output.weight.data = columns[:, list(order)].flatten(1).contiguous()


def _plans(compression: Compression, context: int) -> list[KeepPlan]:
    """What each layer would keep of a prompt of this length, with the classes that are fixed."""
    policy = compression.policy
    if not isinstance(policy, Full) and not _has_fixed_classes(policy):
        raise ExportError(
            f"{policy.name} tells heads or tokens apart per prompt in a way that cannot be baked - "
            "use task-kv or retrieval-kv with a profile, or full"
        )
    plans = []
    for layer, (shape, budget) in enumerate(zip(compression.shapes, compression.allocate(context), strict=True)):
        visible = shape.visible(context)
        # Fixed classes ask only for lengths: one feature a token stands in for real keys.
        queries, keys = torch.zeros(shape.query_heads, visible, 1), torch.zeros(shape.kv_heads, visible, 1)
        plans.append(policy.plan(PromptView(layer, len(compression.shapes), queries, keys, keys, 1.0), budget))
    return plans


def _has_fixed_classes(policy: Policy) -> bool:
    scored = isinstance(policy, SinksMiddleRecent) and bool(getattr(policy, "head_scores", None))
    return scored and not policy.compares_layers  # which gives a head other lengths for another prompt


def _full(plan: KeepPlan, visible: int) -> tuple[int, ...]:
    """KV heads that keep everything that their layer sees."""
    return tuple(head for head, kept in enumerate(plan.kept) if len(kept) == visible)


def _full_first(full: Sequence[int], heterogeneous: Sequence[int], kv_heads: int) -> tuple[int, ...]:
    """Old indices in the new order: full at this budget, heterogeneous at a larger one, the rest."""
    return tuple(sorted(range(kv_heads), key=lambda head: (head not in full, head not in heterogeneous, head)))


def _kept_by_others(plans: Sequence[KeepPlan], shapes: Sequence[LayerShape], context: int) -> int:
    """Tokens for each of the heads that are not full, the same for all of them, so that their sum stays the plans'."""
    lengths = [
        len(kept)
        for plan, shape in zip(plans, shapes, strict=True)
        for head, kept in enumerate(plan.kept)
        if shape.window is None and head not in _full(plan, shape.visible(context))
    ]
    return sum(lengths) // len(lengths) if lengths else context


def _reordered(
    profile: HeadProfile, orders: Sequence[Sequence[int]], model: nn.Module, shapes: Sequence[LayerShape]
) -> HeadProfile:
    """The profile of the baked model."""
    return replace(
        profile,
        scores=tuple(tuple(row[head] for head in order) for row, order in zip(profile.scores, orders, strict=True)),
        heterogeneous=tuple(
            tuple(sorted(order.index(head) for head in heads))
            for heads, order in zip(profile.heterogeneous, orders, strict=True)
        ),
        fingerprint=fingerprint_of(model),
    )
