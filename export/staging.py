"""An exported folder is written whole or not at all: into a hidden sibling, which is renamed at the end."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import ExportError
from thinkkv.sdk.manifest import write_manifest


@contextmanager
def staged(target: Path, *, needs: int, force: bool = False) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place, with a manifest, when the block ends well.

    Args:
        target: where the bundle goes.
        needs: bytes that it will take, checked against the free disk first.
        force: replace what is there.

    Raises:
        ExportError: ``target`` exists, or there is no room.
    """
    check_target(target, needs=needs, force=force)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        write_manifest(temporary)
        temporary.chmod(0o755)
        _replace(temporary, target)
    except OSError as error:
        raise ExportError(
            f"cannot write {target} ({error.strerror or error}) - choose another folder with --out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path, *, needs: int = 0, force: bool = False) -> None:
    """Raise ExportError where a bundle cannot go to ``target``, before any work is done."""
    if target.exists() and not force and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} exists - name another folder with --out, or replace it with --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise ExportError(
            f"cannot write to {target.parent} ({error.strerror}) - choose another folder with --out"
        ) from error
    if free < needs:
        raise ExportError(
            f"{target.parent} has {free / 1e9:.1f} GB free and the export needs about {needs / 1e9:.1f} - "
            "free some, or choose another disk with --out"
        )


def write_json(path: Path, content: Any) -> None:
    """A JSON file of a bundle."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(temporary: Path, target: Path) -> None:
    """Put ``temporary`` in the place of ``target``; what was there survives until the new folder stands."""
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        target.rename(old / target.name)
    try:
        temporary.rename(target)
    except BaseException:
        if old is not None:
            (old / target.name).rename(target)
        raise
    finally:
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
