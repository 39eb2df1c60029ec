"""What ``thinkkv export`` exports when no model is named: the newest finished output of ``patch`` or ``train``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import ThinkKVError
from thinkkv.sdk.outputs import RESULT_FILE, newest_finished


@dataclass(frozen=True)
class Choice:
    """What to export.

    Args:
        model: alias, hub id, folder or file.
        profile: profile folder.
        adapter: PEFT folder to merge.
        policy, ratio, budget: as patched; None where nothing says so.
        found_in: the output folder that said so.
    """

    model: str
    profile: Path | None = None
    adapter: Path | None = None
    policy: str | None = None
    ratio: float | None = None
    budget: int | None = None
    found_in: Path | None = None


def newest_choice() -> Choice:
    """The newest finished output; a training run takes the profile of the newest patch of the same model.

    Raises:
        ThinkKVError: there is none.
    """
    patched, trained = _finished("patch"), _finished("train")
    if patched is None and trained is None:
        raise ThinkKVError("nothing to export here - run `thinkkv patch` first, or name a --model")
    if trained is None or (patched is not None and _written(patched) > _written(trained)):
        assert patched is not None
        return _of_patch(*patched)
    folder, result = trained
    model, adapter = result.get("model") or result.get("merged"), result.get("adapter")
    if not model:
        raise ThinkKVError(f"{folder} does not say which model it trained - name it with --model and --adapter")
    if patched is not None and patched[1]["model"] == model:
        return replace(_of_patch(*patched), adapter=Path(adapter) if adapter else None, found_in=folder)
    return Choice(model=model, adapter=Path(adapter) if adapter else None, found_in=folder)


def _of_patch(folder: Path, result: dict[str, Any]) -> Choice:
    return Choice(
        model=result["model"],
        profile=Path(result["profile"]) if result.get("profile") else None,
        policy=result.get("policy"),
        ratio=result.get("ratio"),
        budget=result.get("budget"),
        found_in=folder,
    )


def _finished(command: str) -> tuple[Path, dict[str, Any]] | None:
    try:
        return newest_finished(command)
    except ThinkKVError:
        return None


def _written(found: tuple[Path, dict[str, Any]]) -> float:
    return (found[0] / RESULT_FILE).stat().st_mtime
