"""Tasks by name; a generated one is a function in a file beside these and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.evaluation.tasks.haystack_reasoning import haystack_reasoning
from thinkkv.sdk.evaluation.tasks.needles import (
    KEYS,
    niah_every_key,
    niah_multikey,
    niah_multivalue,
    niah_single,
    passkey,
)
from thinkkv.sdk.evaluation.tasks.own_data import read_samples
from thinkkv.sdk.evaluation.tasks.perplexity import Perplexity, builtin_text
from thinkkv.sdk.evaluation.tasks.reasoning import reasoning
from thinkkv.sdk.evaluation.tasks.task import GeneratedTask, Task
from thinkkv.sdk.evaluation.tasks.variable_tracking import variable_tracking
from thinkkv.sdk.evaluation.tasks.word_count import word_count

_GENERATED = (
    GeneratedTask("niah-single", niah_single),
    GeneratedTask("niah-multikey", niah_multikey),
    GeneratedTask("niah-every-key", niah_every_key, questions=KEYS),
    GeneratedTask("niah-multivalue", niah_multivalue),
    GeneratedTask("variable-tracking", variable_tracking),
    GeneratedTask("word-count", word_count),
    GeneratedTask("passkey", passkey),
    GeneratedTask("haystack-reasoning", haystack_reasoning),
)
GENERATED: Mapping[str, GeneratedTask] = {task.name: task for task in _GENERATED}
"""A generated task has a function of a random generator; ``fit`` grows the layout that it returns to a size."""

NAMES = (*GENERATED, "perplexity", "perplexity:FILE", "reasoning", "reasoning:GENERATOR", "data:FILE")


def is_known(name: str) -> bool:
    """Whether there is a task of this name, or of this kind."""
    kind, _, argument = name.partition(":")
    return name in GENERATED or kind in ("perplexity", "reasoning") or (kind == "data" and bool(argument))


def task_named(name: str, read: Callable[[Path], str]) -> Task:
    """The task of a name on the command line.

    Args:
        name: one of ``NAMES``.
        read: reads a text file.

    Raises:
        ThinkKVError: there is no such task, or its file or package cannot be used.
    """
    kind, _, argument = name.partition(":")
    if not is_known(name):
        raise ThinkKVError(f"no task {name!r} - choose among {', '.join(NAMES)}")
    if name in GENERATED:
        return GENERATED[name]
    if kind == "data":
        return read_samples(Path(argument), read(Path(argument)))
    if kind == "reasoning":
        return reasoning(argument or None)
    if not argument:
        return Perplexity(builtin_text())
    return Perplexity(read(Path(argument)), f"perplexity:{Path(argument).name}")
