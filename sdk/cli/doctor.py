"""``thinkkv doctor``: what is installed, what the machine has, and what thinkkv can do with it."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from thinkkv.sdk.cli.console import print_json, progress, width_of
from thinkkv.sdk.cli.options import json_option

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from rich.table import Table


@click.command(
    epilog="""\b
Examples:
  thinkkv doctor
  thinkkv doctor --json"""
)
@json_option
def doctor(as_json: bool) -> None:
    """Show versions, devices, models, extras and what is supported.

    Downloads nothing and asks no network.
    """
    with progress("looking around"):
        found = _examine()
    if as_json:
        print_json(found)
    else:
        _show(found)


def _examine() -> dict[str, Any]:
    from thinkkv.patches.registry import architectures  # loads transformers' modeling code
    from thinkkv.sdk.policies import POLICIES

    requirements = _requirements()
    return {
        "thinkkv": metadata.version("thinkkv"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in sorted({need.name for _, need in requirements})},
        "device": _device(),
        "kernels": _kernels(),
        "models": _models(),
        "extras": _extras(requirements),
        "architectures": sorted(architectures()),
        "policies": list(POLICIES),
    }


def _requirements() -> list[tuple[str | None, Requirement]]:
    """What the installed distribution asks for: the extra, or None, and the requirement."""
    from packaging.requirements import Requirement

    found = []
    for line in metadata.requires("thinkkv") or []:
        extra = re.search(r"""extra == ["']([\w-]+)["']""", line)
        found.append((extra.group(1) if extra else None, Requirement(line)))
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    """The device that torch would use, and how many of them or of their threads there are."""
    import torch  # heavy: not for `--help`

    if torch.cuda.is_available():
        kind = "rocm" if torch.version.hip else "cuda"
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    elif torch.backends.mps.is_available():
        kind, names = "mps", [platform.machine()]
    else:
        kind, names = "cpu", [platform.processor() or platform.machine()]
    return {"kind": kind, "names": names, "threads": torch.get_num_threads()}


def _kernels() -> list[dict[str, Any]]:
    """Which implementation each operation has on the device, and why."""
    from thinkkv.kernels.dispatch import OPERATIONS, KernelError, choose_for

    kind = _device()["kind"]
    device = "cuda" if kind == "rocm" else kind  # torch calls AMD's devices so too
    try:
        choices = {name: choose_for(name, device) for name in OPERATIONS}
    except KernelError as error:
        return [{"operation": name, "backend": None, "reason": str(error)} for name in OPERATIONS]
    return [{"operation": name, "backend": choice.backend, "reason": choice.reason} for name, choice in choices.items()]


def _models() -> list[dict[str, Any]]:
    """Every alias, where it comes from, and whether it is on this machine."""
    from thinkkv.sdk.model_sources import ALIASES, cached_snapshot, packaged_file

    found = []
    for name, alias in ALIASES.items():
        if alias.extra is None:
            status = "cached" if cached_snapshot(alias.location) else "to download"
        else:
            status = "packaged" if packaged_file(alias) else f"needs pip install 'thinkkv[{alias.extra}]'"
        found.append({"alias": name, "source": alias.location, "status": status})
    return found


def _extras(requirements: Iterable[tuple[str | None, Requirement]]) -> list[dict[str, Any]]:
    """Every extra, what is missing of it, and how to get it."""
    needs: dict[str, list[Requirement]] = {}
    for extra, need in requirements:
        if extra is not None:
            needs.setdefault(extra, []).append(need)
    return [
        {
            "extra": extra,
            "missing": [str(need.name) for need in wanted if not _satisfied(need)],
            "install": f"pip install 'thinkkv[{extra}]'",
        }
        for extra, wanted in needs.items()
    ]


def _satisfied(need: Requirement) -> bool:
    version = _version(need.name)
    return version is not None and need.specifier.contains(version, prereleases=True)


def _show(found: dict[str, Any]) -> None:
    """The tables, on stdout: they are this command's result."""
    from rich.console import Console

    console = Console(highlight=False, width=width_of(sys.stdout))
    device = found["device"]
    console.print(f"thinkkv {found['thinkkv']}, Python {found['python']}, {found['platform']}")
    console.print(f"device: {device['kind']} ({', '.join(device['names'])}), {device['threads']} threads")
    console.print(f"architectures: {', '.join(found['architectures'])}")
    console.print(f"policies: {', '.join(found['policies'])}")
    console.print(_kernels_table(found["kernels"]))
    console.print(_versions_table(found["versions"]))
    console.print(_extras_table(found["extras"]))
    console.print(_models_table(found["models"]))


def _kernels_table(kernels: list[dict[str, Any]]) -> Table:
    table = _table("operation", "runs as", "because", whole=("operation", "runs as"))
    for kernel in kernels:
        table.add_row(kernel["operation"], kernel["backend"] or "nothing", kernel["reason"].replace("[", r"\["))
    return table


def _versions_table(versions: dict[str, str | None]) -> Table:
    table = _table("package", "version", whole=("package", "version"))
    for name, version in versions.items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    return table


def _extras_table(extras: list[dict[str, Any]]) -> Table:
    table = _table("extra", "state", "install", whole=("extra", "install"))
    for extra in extras:
        missing = ", ".join(extra["missing"])
        # Escaped: rich reads [demo] as markup.
        install = extra["install"].replace("[", r"\[")
        table.add_row(extra["extra"], f"missing {missing}" if missing else "installed", install if missing else "")
    return table


def _models_table(models: list[dict[str, Any]]) -> Table:
    table = _table("model", "source", "state", whole=("model", "source"))
    for model in models:
        table.add_row(model["alias"], model["source"], model["status"].replace("[", r"\["))
    return table


def _table(*columns: str, whole: Sequence[str]) -> Table:
    """An empty table; the columns ``whole`` are to be copied from, so the others wrap where the terminal is narrow."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in whole)
    return table
