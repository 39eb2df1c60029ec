"""What an extra must bring, checked before any of it is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from thinkkv.patches.errors import MissingExtraError


def require(packages: Sequence[str], *, extra: str, purpose: str) -> None:
    """Raise MissingExtraError where a package is not installed.

    Args:
        packages: import names.
        extra: the extra that brings them.
        purpose: what needs them, the beginning of the message.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs {', '.join(missing)}, part of the {extra} extra - pip install 'thinkkv[{extra}]'"
        )
