"""thinkkv for Python: patch a model, calibrate head profiles, load models, read reports.

Names load on first use, so that importing this package costs nothing and pulls in no heavy library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thinkkv.patches.errors import (
        BudgetError,
        MissingExtraError,
        ModelNotFoundError,
        PatchStateError,
        ProfileMismatchError,
        SavedCacheError,
        ThinkKVError,
        UnsupportedGenerationError,
        UnsupportedModelError,
    )
    from thinkkv.sdk.baked import handle_of, load
    from thinkkv.sdk.cache import HeterogeneousCache
    from thinkkv.sdk.calibration import calibrate
    from thinkkv.sdk.patching import PatchHandle, apply
    from thinkkv.sdk.policies import POLICIES, Policy
    from thinkkv.sdk.profile import HeadProfile
    from thinkkv.sdk.report import Report

_HOMES = {
    "apply": "thinkkv.sdk.patching",
    "PatchHandle": "thinkkv.sdk.patching",
    "calibrate": "thinkkv.sdk.calibration",
    "handle_of": "thinkkv.sdk.baked",
    "load": "thinkkv.sdk.baked",
    "HeadProfile": "thinkkv.sdk.profile",
    "HeterogeneousCache": "thinkkv.sdk.cache",
    "Report": "thinkkv.sdk.report",
    "Policy": "thinkkv.sdk.policies",
    "POLICIES": "thinkkv.sdk.policies",
    "ThinkKVError": "thinkkv.patches.errors",
    "UnsupportedModelError": "thinkkv.patches.errors",
    "BudgetError": "thinkkv.patches.errors",
    "ProfileMismatchError": "thinkkv.patches.errors",
    "UnsupportedGenerationError": "thinkkv.patches.errors",
    "PatchStateError": "thinkkv.patches.errors",
    "ModelNotFoundError": "thinkkv.patches.errors",
    "MissingExtraError": "thinkkv.patches.errors",
    "SavedCacheError": "thinkkv.patches.errors",
}

__all__ = [
    "POLICIES",
    "BudgetError",
    "HeadProfile",
    "HeterogeneousCache",
    "MissingExtraError",
    "ModelNotFoundError",
    "PatchHandle",
    "PatchStateError",
    "Policy",
    "ProfileMismatchError",
    "Report",
    "SavedCacheError",
    "ThinkKVError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
    "apply",
    "calibrate",
    "handle_of",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
