"""What is noted beside a measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from thinkkv.sdk import machine


def test_the_command_is_noted_without_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "eval", "--out", "/somewhere", "--ratio", "0.4", "--folder=/else", "a b"])
    assert machine.described("thinkkv")["command"] == "thinkkv eval --ratio 0.4 'a b'"


def test_the_commit_is_that_of_the_checkout() -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("no checkout")
    found = machine.commit()
    assert found is not None
    assert head.stdout.startswith(found.rstrip("+"))


def test_an_installed_package_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor has one inside the checkout of something else, which does not track it."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "machine.py").write_text("")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "site" / "machine.py"))
    assert machine.commit() is None
