"""Files of saved caches with another header than they were written with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from thinkkv.sdk.saved_cache import METADATA


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the header of a saved cache."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        header = json.loads(file.metadata()[METADATA])
    save_file(tensors, path, metadata={METADATA: json.dumps(change(header))})
