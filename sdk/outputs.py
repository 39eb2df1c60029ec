"""Where commands leave their results, and how a later command finds the newest finished one.

A finished output folder holds ``result.json``, written last: a killed run has none and is never picked up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.files import write_whole

ROOT = Path("thinkkv-out")
RESULT_FILE = "result.json"


def output_folder(command: str, label: str, out: Path | None) -> Path:
    """The folder of one run: ``out``, or one below ``thinkkv-out/``; created if need be.

    Raises:
        ThinkKVError: it cannot be written to.
    """
    folder = out or default_folder(command, label)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise ThinkKVError(f"cannot write to {folder} ({error.strerror}) - choose another folder with --out") from None
    return folder


def default_folder(command: str, label: str) -> Path:
    """Where a command leaves what it makes of a model or recipe, unless the user says otherwise."""
    return ROOT / f"{command}-{label.replace('/', '--')}"


def finish(folder: Path, result: Mapping[str, Any]) -> None:
    """Mark an output folder as finished by writing its result."""
    write_whole(folder / RESULT_FILE, (json.dumps(result, indent=1) + "\n").encode())


def newest_finished(command: str) -> tuple[Path, dict[str, Any]]:
    """Folder and result of the newest finished run of a command below ``thinkkv-out/``.

    Raises:
        ThinkKVError: there is none.
    """
    found = sorted(ROOT.glob(f"{command}-*/{RESULT_FILE}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ThinkKVError(f"no finished output of `thinkkv {command}` below {ROOT}/ - run it first, or name a --model")
    return found[-1].parent, json.loads(found[-1].read_text(encoding="utf-8"))
