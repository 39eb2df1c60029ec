"""What is not exactly what was exported is refused; what was not exported to its end is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from thinkkv.export.staging import staged
from thinkkv.patches.errors import BundleError, ExportError
from thinkkv.sdk.manifest import MANIFEST_FILE, verify


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    with staged(folder, needs=1) as temporary:
        (temporary / "model.onnx").write_bytes(b"graph")
        (temporary / "model.onnx.data").write_bytes(bytes(1000))
        (temporary / "deep").mkdir()
        (temporary / "deep" / "more.json").write_text("{}")
    return folder


def manifest(folder: Path, **changes: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_first(folder: Path, name: str) -> None:
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    manifest(folder, files=[files[0] | {"path": name}, *files[1:]])


def link_out(folder: Path) -> None:
    (folder.parent / "elsewhere").write_bytes(b"graph")
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (lambda folder: (folder / "model.onnx").write_bytes(b"grabh"), "was changed"),
    "missing": (lambda folder: (folder / "model.onnx").unlink(), "lacks model.onnx"),
    "extra": (lambda folder: (folder / "deep" / "extra.bin").write_bytes(b"x"), "holds deep/extra.bin"),
    "cut off": (lambda folder: (folder / "model.onnx.data").write_bytes(bytes(999)), "999 bytes instead of 1000"),
    "parent": (lambda folder: rename_first(folder, "../outside"), "leaves the folder"),
    "absolute": (lambda folder: rename_first(folder, "/etc/passwd"), "leaves the folder"),
    "drive": (lambda folder: rename_first(folder, "c:\\windows"), "leaves the folder"),
    "link": (link_out, "leaves the folder"),
    "newer": (lambda folder: manifest(folder, schema=99), "upgrade thinkkv"),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), "no manifest.json"),
    "no json": (lambda folder: (folder / MANIFEST_FILE).write_text("{"), "is damaged"),
    "other json": (lambda folder: (folder / MANIFEST_FILE).write_text("[]"), "is damaged"),
}


def test_a_whole_bundle_passes(bundle: Path) -> None:
    assert [file.path for file in verify(bundle)] == ["deep/more.json", "model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_refused_in_one_line(bundle: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(bundle)
    with pytest.raises(BundleError, match=message) as refusal:
        verify(bundle)
    assert "\n" not in str(refusal.value)
    assert " - " in str(refusal.value)


def export_half(target: Path) -> None:
    with staged(target, needs=1) as temporary:
        (temporary / "half").write_bytes(b"half")
        raise KeyboardInterrupt


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export_half(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_without_force(bundle: Path) -> None:
    with pytest.raises(ExportError, match="--force"), staged(bundle, needs=1):
        raise AssertionError("must not get here")
    assert len(verify(bundle)) == 3


def test_an_interrupted_replacement_leaves_the_old_one(bundle: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(bundle, needs=1, force=True):
        raise KeyboardInterrupt
    assert len(verify(bundle)) == 3
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_force_replaces(bundle: Path) -> None:
    with staged(bundle, needs=1, force=True) as temporary:
        (temporary / "only").write_bytes(b"new")
    assert [file.path for file in verify(bundle)] == ["only"]
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_full_disk_is_seen_first(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="GB free"), staged(tmp_path / "out", needs=10**18):
        raise AssertionError("must not get here")
    assert list(tmp_path.iterdir()) == []
