"""Compile a kernel in C for this very processor, once, with the compiler that is there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


class NoKernelError(RuntimeError):
    """No kernel in C can be made or loaded here; the message says why."""


def load(source: Path) -> ctypes.CDLL:
    """The library of one source file, compiled where that has not been done.

    Raises:
        NoKernelError: there is no compiler, or what it makes does not compile or load.
    """
    try:
        return ctypes.CDLL(str(compiled(source)))  # binds every symbol at once: a missing OpenMP runtime fails here
    except OSError as error:
        raise NoKernelError(f"the kernel cannot be loaded: {error}") from error


def compiled(source: Path) -> Path:
    """The file of that library.

    Compiled code is kept in the user's cache folder, by source, headers in the folder above, compiler and processor.

    Raises:
        NoKernelError: there is no compiler, or it fails, or its output cannot be kept.
    """
    compiler = _compiler()
    sources = (source, *sorted(source.parents[1].glob("*.h")))
    identity = [*(path.read_bytes() for path in sources), repr(compiler).encode(), _target(compiler)]
    digest = hashlib.sha256(b"\0".join(identity)).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    library = Path(root, "thinkkv", "kernels", f"{source.parent.name}-{digest}.so")
    try:
        if not library.exists():
            _compile(compiler, source, library)
    except OSError as error:
        raise NoKernelError(f"the kernel cannot be kept: {error}") from error
    return library


def _compiler() -> tuple[str, ...]:
    named = os.environ.get("CC")
    if named:
        return tuple(shlex.split(named))
    for name in COMPILERS:
        if shutil.which(name):
            return (name,)
    raise NoKernelError("no C compiler found; with one it would be faster: install gcc or clang, or set CC")


def _target(compiler: tuple[str, ...]) -> bytes:
    """What the compiler says of itself and of the processor: its predefined macros."""
    return _run([*compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull])


def _compile(compiler: tuple[str, ...], source: Path, library: Path) -> None:
    """Write the library, whole or not at all: other processes may be doing the same."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{library.stem}.") as folder:
        made = Path(folder, library.name)
        _run([*compiler, *FLAGS, str(source), "-o", str(made), "-lm"])
        made.replace(library)


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        said = next((line for line in lines if "error" in line), f"exit code {error.returncode}")
        raise NoKernelError(f"{command[0]} failed: {said}") from error
    except OSError as error:
        raise NoKernelError(f"{command[0]} cannot be run: {error}") from error
