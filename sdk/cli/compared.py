"""What ``thinkkv eval`` and ``thinkkv bench`` share: the model, and the policies, ratios and contexts to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from thinkkv.sdk.cli.console import console, track
from thinkkv.sdk.cli.loading import load
from thinkkv.sdk.cli.options import POLICY_NAMES, Command

if TYPE_CHECKING:
    from rich.table import Table

    from thinkkv.sdk.evaluation.setting import Setting
    from thinkkv.sdk.profile import HeadProfile

Number = TypeVar("Number", int, float)
DEFAULT_POLICIES = ",".join(POLICY_NAMES)


def compared_options(command: Command) -> Command:
    """``--model``, ``--profile``, ``--policies``, ``--ratio``, ``--contexts`` and ``--out``."""
    for option in (
        click.option(
            "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder.  [default: thinkkv-out/...]"
        ),
        click.option("--contexts", metavar="N,M", help="Tokens of a prompt."),
        click.option(
            "--ratio", default="0.4", show_default=True, metavar="R,S", help="Shares of the full cache to keep."
        ),
        click.option(
            "--policies", metavar="P,Q", help="With options: task-kv+nearest=none+recent=128.  [default: all policies]"
        ),
        click.option(
            "--profile",
            type=click.Path(path_type=Path),
            multiple=True,
            help="Profile folder that fixes the classes of its policy's heads; repeatable.",
        ),
        click.option(
            "--model", metavar="M", help="Alias, hub id, folder or GGUF file.  [default: of the newest `thinkkv patch`]"
        ),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Compared:
    """The model of a comparison, and the policies.

    Args:
        model: alias, hub id, folder or file.
        profile_folders: of head profiles.
        policies: with their options.
    """

    model: str
    profile_folders: tuple[Path, ...]
    policies: tuple[str, ...]

    @classmethod
    def of(cls, model: str | None, profiles: tuple[Path, ...], policies: str | None) -> Compared:
        """From the command line; without a model, that and the profile of the newest ``thinkkv patch``."""
        names = tuple(words(policies or DEFAULT_POLICIES, "--policies"))
        if model is not None:
            return cls(model, profiles, names)
        from thinkkv.sdk.outputs import newest_finished

        folder, result = newest_finished("patch")
        console.print(f"using model {result['model']} and profile of {folder}", highlight=False)
        found = (Path(result["profile"]),) if result["profile"] and not profiles else profiles
        return cls(result["model"], found, names)

    def folder(self, command: str, out: Path | None) -> Path:
        """Where the results go; the model is looked for first."""
        from thinkkv.sdk.model_sources import resolve
        from thinkkv.sdk.outputs import output_folder

        resolve(self.model)
        return output_folder(command, Path(self.model).name, out)

    def load(self, dtype: str | None) -> tuple[Any, Any]:
        """Model and tokenizer."""
        return load(self.model, dtype)

    def profiles(
        self, network: Any, tokenizer: Any, settings: Iterable[Setting], folder: Path
    ) -> dict[str, HeadProfile]:
        """Profiles by policy: the given ones; where a retrieval profile is missing, one calibrated into ``folder``."""
        from thinkkv.sdk.calibration import calibrate
        from thinkkv.sdk.profile import PROFILE_FILE, HeadProfile

        found = {profile.score: profile for profile in map(HeadProfile.load, self.profile_folders)}
        needed = {setting.policy.name: setting.policy.profile_score for setting in settings}
        if "retrieval" in needed.values() and "retrieval" not in found:
            kept = folder / "retrieval-profile"
            if not (kept / PROFILE_FILE).exists():
                calibrate(network, tokenizer, score="retrieval", progress=track("calibrating heads by retrieval")).save(
                    kept
                )
            found["retrieval"] = HeadProfile.load(kept)
        chosen = {policy: found[score] for policy, score in needed.items() if score in found}
        for profile in chosen.values():
            profile.check(network)
        return chosen


def words(text: str, option: str) -> Sequence[str]:
    """The parts of a list with commas."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise click.UsageError(f"{option} is empty - name at least one")
    return list(dict.fromkeys(found))


def numbers(text: str, option: str, kind: Callable[[str], Number]) -> Sequence[Number]:
    """The positive numbers of a list with commas."""
    try:
        found = [kind(part) for part in words(text, option)]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise click.UsageError(f"{option} {text} - give positive numbers with commas")
    return found


def settings_table(*before: str, after: Sequence[str], title: str | None = None) -> Table:
    """An empty table of settings, so narrow that a terminal of 80 columns shows every cell whole.

    Args:
        before: columns before the policy's, which is folded where it has to be: options tell rows apart.
        after: columns of numbers after it.
        title: above it.
    """
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, collapse_padding=True
    )
    for column in before:
        table.add_column(column)
    table.add_column("policy", overflow="fold", min_width=10)
    for column in after:
        table.add_column(column, justify="right")
    return table
