"""A prompt in, a text and what it cost out: what ``thinkkv generate`` and ``thinkkv run`` share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import click

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.cli.console import console
from thinkkv.sdk.cli.options import Command, read_text


def prompt_options(command: Command) -> Command:
    """``--prompt``, ``--prompt-file``, ``--max-new-tokens`` and ``--raw``."""
    for option in (
        click.option("--raw", is_flag=True, help="Feed the prompt as it is, without the tokenizer's chat template."),
        click.option("--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True),
        click.option("--prompt-file", type=click.Path(path_type=Path), help="A text file with the prompt."),
        click.option("--prompt", help="The prompt."),
    ):
        command = option(command)
    return command


def prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt of a command: given, from a file, or from standard input."""
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other - give one")
    if prompt is None and prompt_file is None:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt - give --prompt, --prompt-file or standard input")
        prompt = _standard_input()
    text = read_text(prompt_file) if prompt_file is not None else str(prompt)
    if not text.strip():
        raise click.UsageError("the prompt is empty - give it some text")
    return text


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise ThinkKVError("standard input is no UTF-8 text - convert it first") from None


def echo(text: str) -> None:
    """A piece of the generated text, on stdout."""
    click.echo(text, nl=False)


def show_bytes(held: Mapping[str, int]) -> None:
    """The bytes of a cache and their shares of the full one, on stderr."""
    full = max(1, held["full"])
    console.print(
        "bytes: " + ", ".join(f"{name} {value:,} ({value / full:.0%})" for name, value in held.items()),
        highlight=False,
    )
