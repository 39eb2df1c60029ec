"""What the ``train`` extra must bring, checked before any of it is imported."""

from __future__ import annotations

import importlib.util

from thinkkv.patches.errors import MissingExtraError

TRAIN = ("trl", "peft", "accelerate", "datasets", "yaml")


def require(packages: tuple[str, ...] = TRAIN, extra: str = "train") -> None:
    """Raise MissingExtraError for a package that is not installed.

    Args:
        packages: import names.
        extra: the extra that brings them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"this recipe needs {', '.join(missing)} of the {extra} extra - pip install 'thinkkv[{extra}]'"
        )
