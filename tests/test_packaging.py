"""The distribution holds every package of the folders that it maps below ``thinkkv``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sdk", "patches", "kernels", "export", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_in(folder: str) -> set[str]:
    parents = (init.parent.relative_to(ROOT) for init in (ROOT / folder).rglob("__init__.py"))
    return {".".join(("thinkkv", *parent.parts)) for parent in parents}


def test_the_declared_packages_are_the_folders() -> None:
    found = set().union(*(packages_in(folder) for folder in FOLDERS))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_code_is_a_package() -> None:
    modules = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    assert [str(path) for path in modules if not (path.parent / "__init__.py").exists()] == []


def test_top_level_folders_are_mapped() -> None:
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapped == {f"thinkkv.{folder}": folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()}


def test_sources_in_c_are_shipped() -> None:
    data = PROJECT["tool"]["setuptools"]["package-data"]
    sources = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.[ch]")]
    patterns = {path: data["*"] + data.get(".".join(("thinkkv", *path.parent.parts)), []) for path in sources}
    assert sources
    assert [str(path) for path, mine in patterns.items() if not any(map(path.match, mine))] == []


def test_the_tested_versions_are_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []


@pytest.mark.parametrize("extra", sorted(PROJECT["project"]["optional-dependencies"]))
def test_every_extra_is_pinned(extra: str) -> None:
    pinned = {normal(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = {normal(re.split(r"[<>=!~ ]", need)[0]) for need in PROJECT["project"]["optional-dependencies"][extra]}
    assert wanted - pinned - {"onnxruntime-gpu"} == set()  # the GPU build of a package that is pinned


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
