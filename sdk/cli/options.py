"""Command line options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from thinkkv.patches.errors import ThinkKVError

Command = TypeVar("Command", bound=Callable[..., Any])

POLICY_NAMES = (
    "full",
    "task-kv",
    "retrieval-kv",
    "evidence-kv",
    "rehearsed-kv",
    "reread-kv",
    "matched-kv",
    "streaming-llm",
    "snapkv",
    "pyramidkv",
    "adakv",
    "kvzip",
)
"""As in ``thinkkv.sdk.policies``, repeated here so that a help text loads no torch; a test compares them."""

CACHE_DTYPES = ("model", "int8", "k8v5", "k8v4")
"""Likewise."""

PROFILE_SCORES = {
    "task-kv": "distance",
    "retrieval-kv": "retrieval",
    "evidence-kv": "retrieval",
    "rehearsed-kv": "retrieval",
    "reread-kv": "retrieval",
    "matched-kv": "retrieval",
}
"""The policies that take a profile, and which score it holds; repeated for the same reason."""


def share_a_profile(policy: str | None, other: str | None) -> bool:
    """Whether a profile that was made for the other policy serves this one."""
    return policy == other or (policy in PROFILE_SCORES and PROFILE_SCORES[policy] == PROFILE_SCORES.get(other or ""))


def budget_options(command: Command) -> Command:
    """``--ratio`` or ``--budget``."""
    command = click.option(
        "--budget",
        type=click.IntRange(min=1),
        metavar="N",
        help="Tokens per KV head on average, instead of a ratio.",
    )(command)
    return click.option(
        "--ratio",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="R",
        help="Share of the prompt's full cache to keep, above 0 and up to 1.  [default: 0.4]",
    )(command)


def policy_option(command: Command) -> Command:
    """``--policy``."""
    return click.option("--policy", type=click.Choice(POLICY_NAMES), help="What each KV head keeps.")(command)


def dtype_option(command: Command) -> Command:
    """``--dtype``."""
    return click.option(
        "--dtype",
        type=click.Choice(("float32", "bfloat16", "float16")),
        help="Weights and cache.  [default: the checkpoint's own; float32 for GGUF]",
    )(command)


def json_option(command: Command) -> Command:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")(
        command
    )


def check_budget(ratio: float | None, budget: int | None) -> None:
    """Refuse both at once."""
    if ratio is not None and budget is not None:
        raise click.UsageError("--ratio and --budget exclude each other - give one")


def read_text(path: Path) -> str:
    """The text of a file given on the command line.

    Raises:
        ThinkKVError: it is no UTF-8 text or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ThinkKVError(f"{path} is no UTF-8 text - convert it first") from None
    except OSError as error:
        raise ThinkKVError(f"cannot read {path} ({error.strerror}) - check the path") from None
