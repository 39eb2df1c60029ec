"""What the commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import click
from rich.console import Console
from rich.progress import Progress

from thinkkv.sdk.cli import DEBUG

Item = TypeVar("Item")

PIPED_WIDTH = 120
"""Columns of what goes to a file or a pager, where rich would fold rows at 80."""


def width_of(stream: TextIO) -> int | None:
    """Columns of a table on this stream; None where the terminal, or the user's ``COLUMNS``, says it."""
    return None if stream.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH


console = Console(stderr=True, highlight=False, width=width_of(sys.stderr))
"""Tables, progress and notes."""

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "TQDM_DISABLE": "1"}
"""Environment that libraries read when they are imported; the hub's download bar stays, as it is worth seeing."""


def print_json(result: Any) -> None:
    """Write one JSON object to stdout."""
    click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False))


def quiet_libraries() -> None:
    """Silence other libraries' warnings and bars in this process, unless ``--debug`` was given.

    Works on what is imported later; variables that the user has set are left as they are.
    """
    context = click.get_current_context(silent=True)
    if context is not None and context.meta.get(DEBUG):
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


@contextmanager
def progress(label: str) -> Iterator[None]:
    """Show that a long step of unknown length runs: a spinner on a terminal, a line at its end elsewhere."""
    start = time.monotonic()
    with console.status(f"{label} ..."):
        yield
    console.print(f"{label}: {time.monotonic() - start:.1f} s")


def track(label: str) -> Callable[[Iterable[Item]], Iterable[Item]]:
    """Show how far an iteration is: a bar on a terminal, a line at its end elsewhere.

    Args:
        label: what is being done.

    Returns:
        A wrapper for what is iterated over.
    """

    def wrap(items: Iterable[Item]) -> Iterator[Item]:
        start, items = time.monotonic(), list(items)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            yield from bar.track(items, description=label)
        console.print(f"{label}: {len(items)} in {time.monotonic() - start:.1f} s")

    return wrap
