"""The stock model builder in a process that has loaded it already: one import for all bundles of a test run.

The builder imports for some seconds and builds a tiny model in half of one. A server imports it once and forks for each
build, which then runs as ``python -m`` runs it: with its own arguments, environment, exit code and output.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

BUILDER = "onnxruntime_genai.models.builder"


class WarmBuilder:
    """Stands for :mod:`subprocess` where the builder is called."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([BUILDER])

    def run(
        self, command: Sequence[str], *, env: Mapping[str, str], capture_output: bool, text: bool, check: bool
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of ``python -m`` the builder."""
        assert list(command[:3]) == [sys.executable, "-m", BUILDER]
        assert (capture_output, text, check) == (True, True, False)
        with tempfile.TemporaryDirectory() as folder:
            said = [Path(folder, name) for name in ("stdout", "stderr")]
            process = self._context.Process(target=_build, args=(list(command[3:]), dict(env), *said))
            process.start()
            process.join()
            return subprocess.CompletedProcess(list(command), process.exitcode, *(path.read_text() for path in said))


def _build(arguments: list[str], environment: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [BUILDER, *arguments]
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)
