"""A JSON file of an exported folder: read whole, of a schema that this version knows, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from thinkkv.patches.errors import BundleError

Read = TypeVar("Read")


def read_bundle_json(path: Path, newest: int, build: Callable[[Any], Read]) -> Read:
    """What ``build`` makes of a file's content.

    Args:
        path: of the file.
        newest: the newest schema that is known.
        build: may raise ValueError, KeyError and TypeError where the content is not as it should be.

    Raises:
        BundleError: there is no such file, or it is damaged or of a newer schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if int(content["schema"]) > newest:
            raise BundleError(
                f"{path} has schema {content['schema']}, this thinkkv reads up to {newest} - upgrade thinkkv"
            )
        return build(content)
    except FileNotFoundError:
        raise BundleError(f"no {path.name} in {path.parent} - name a folder that `thinkkv export` wrote") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} is damaged ({error}) - export again") from error
