"""ONNX bundles for a comparison: exported once into the run folder, used again by the next run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from thinkkv.export.bake import bake
from thinkkv.export.export import export
from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.calibration import calibrate
from thinkkv.sdk.evaluation.setting import Setting
from thinkkv.sdk.manifest import MANIFEST_FILE
from thinkkv.sdk.policies import Full
from thinkkv.sdk.profile import SCORES, HeadProfile, score_for

EXPORTED = ("full", *SCORES.values())


def check_exported(settings: Iterable[Setting]) -> None:
    """Raise BudgetError for a policy that ``thinkkv export`` does not know."""
    for setting in settings:
        if setting.policy.name not in EXPORTED:
            raise BudgetError(f"{setting.name} cannot be exported to ONNX - choose among {', '.join(EXPORTED)}")


def bundle(
    load: Callable[[], tuple[Any, Any]],
    setting: Setting,
    profile: HeadProfile | None,
    *,
    label: str,
    fingerprint: Mapping[str, Any],
    context: int,
    quantize: Literal["none", "int8", "int4"],
    folder: Path,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Path:
    """Where a setting's bundle is.

    Args:
        load: loads model and tokenizer anew, because baking changes the weights in place.
        setting: of a policy that can be exported.
        profile: of the policy; calibrated where there is none.
        label, fingerprint: of the model.
        context: that the ratio refers to.
        quantize: the weights.
        folder: below which bundles are kept, each under a name that says what it was made of.
        progress: wraps a calibration's prompts.
    """
    whole = isinstance(setting.policy, Full)
    made_of = json.dumps([fingerprint, None if whole or profile is None else profile.scores])
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:8]
    target = folder / f"{setting.name}-{setting.ratio:g}-{'any' if whole else context}-{quantize}-{digest}"
    if (target / MANIFEST_FILE).exists():
        return target
    model, tokenizer = load()
    if profile is None and not whole:
        profile = calibrate(model, tokenizer, score=score_for(setting.policy.name), progress=progress)
    baked = bake(
        model,
        tokenizer,
        policy=setting.policy,
        budget=setting.budget,
        profile=None if whole else profile,
        adapter=None,
        context=None if whole else context,
        label=label,
        location=label,
    )
    export(baked, target, format="onnx", quantize=quantize, verify=False)
    return target
