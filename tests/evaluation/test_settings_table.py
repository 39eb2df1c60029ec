"""Tables of settings on a narrow terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from thinkkv.sdk.cli.compared import settings_table
from thinkkv.sdk.cli.console import width_of

POLICY = "matched-kv+cache_dtype=k8v4"
SPEED = (
    "ratio",
    "context",
    "threads",
    "prefill\ns",
    "tokens\n/s",
    "ms a\nstep",
    "cache\nMiB",
    "used\nMiB",
    "peak\nMiB",
)
NUMBERS = ("0.15", "2000", "2", "21.93", "18.2", "39-62", "8.1", "6.7", "612.3")


def test_eighty_columns_show_every_number_and_the_whole_policy() -> None:
    table = settings_table("runtime", after=SPEED)
    table.add_row("torch", POLICY, *NUMBERS)
    console = Console(width=80)
    with console.capture() as shown:
        console.print(table)
    first, *folded = shown.get().splitlines()[2:]
    runtime, policy, *numbers = first.split()
    assert (runtime, *numbers) == ("torch", *NUMBERS)
    assert "".join([policy, *(line.strip() for line in folded)]) == POLICY


def test_what_is_piped_is_wide_unless_the_user_says_how_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert width_of(io.StringIO()) == 120
    monkeypatch.setenv("COLUMNS", "200")
    assert width_of(io.StringIO()) is None
