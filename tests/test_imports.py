"""Imports between the folders point one way: ``sdk.cli -> recipes, export -> sdk -> patches -> kernels``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": {"kernels"},
    "patches": {"patches", "kernels"},
    "sdk": {"sdk", "patches", "kernels"},
    "recipes": {"recipes", "sdk", "patches", "kernels"},
    "export": {"export", "sdk", "patches", "kernels"},
}
CLI = ROOT / "sdk" / "cli"


def imported(path: Path) -> Iterator[str]:
    """The folders of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in modules if name.startswith("thinkkv."))


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_one_way(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if CLI not in path.parents]
    assert files
    wrong = {str(path.relative_to(ROOT)): found - ALLOWED[folder] for path in files if (found := set(imported(path)))}
    assert {path: names for path, names in wrong.items() if names} == {}
