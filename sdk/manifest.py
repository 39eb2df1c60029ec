"""The manifest of an exported folder: the length and SHA-256 of every other file.

``verify`` is called before anything of a folder is loaded: what is not what was written is refused.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from thinkkv.patches.errors import BundleError
from thinkkv.sdk.bundle_json import read_bundle_json

MANIFEST_FILE = "manifest.json"
SCHEMA = 1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle.

    Args:
        path: relative, with forward slashes.
        bytes: its length.
        sha256: of its content, hexadecimal.
    """

    path: str
    bytes: int
    sha256: str


def write_manifest(folder: Path) -> list[BundleFile]:
    """List every file of a folder with its hash, in ``manifest.json``."""
    files = [_entry(folder, path) for path in sorted(_files(folder))]
    content = {"schema": SCHEMA, "files": [vars(file) for file in files]}
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return files


def read_manifest(folder: Path) -> list[BundleFile]:
    """The files that a bundle says it has, without looking at them.

    Raises:
        BundleError: there is no manifest, or it is damaged, newer, or points out of the folder.
    """
    files = read_bundle_json(folder / MANIFEST_FILE, SCHEMA, _listed)
    for file in files:
        _refuse_outside(folder, file.path)
    return files


def _listed(content: Any) -> list[BundleFile]:
    return [BundleFile(str(file["path"]), int(file["bytes"]), str(file["sha256"])) for file in content["files"]]


def verify(folder: Path) -> list[BundleFile]:
    """Hold every file against the manifest.

    Returns:
        The files.

    Raises:
        BundleError: a file is changed, cut off, missing or not listed.
    """
    files = read_manifest(folder)
    listed = {file.path for file in files}
    extra = sorted(
        str(_relative(folder, path)) for path in _files(folder) if str(_relative(folder, path)) not in listed
    )
    if extra:
        raise BundleError(f"{folder} holds {extra[0]}, which its manifest does not list - remove it, or export again")
    for file in files:
        path = folder / file.path
        if not path.is_file():
            raise BundleError(f"{folder} lacks {file.path} - copy it again, or export again")
        if path.stat().st_size != file.bytes:
            raise BundleError(
                f"{path} has {path.stat().st_size} bytes instead of {file.bytes} - copy it again, or export again"
            )
    for file in files:  # lengths first: reading gigabytes only to find a missing file would waste minutes
        if _sha256(folder / file.path) != file.sha256:
            raise BundleError(f"{folder / file.path} was changed since its export - copy it again, or export again")
    return files


def _refuse_outside(folder: Path, name: str) -> None:
    pure = PurePosixPath(name)
    outside = not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name
    # A link inside the folder may point out of it as well.
    if outside or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"the manifest of {folder} names {name!r}, which leaves the folder - do not use this bundle")


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return [path for path in found if path != folder / MANIFEST_FILE]


def _relative(folder: Path, path: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(folder).as_posix())


def _entry(folder: Path, path: Path) -> BundleFile:
    return BundleFile(str(_relative(folder, path)), path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_BLOCK):
            digest.update(chunk)
    return digest.hexdigest()
