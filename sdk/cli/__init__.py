"""The command ``thinkkv``: its commands load on first use, and every failure is one line on stderr.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import traceback
from typing import IO, Any

import click

from thinkkv.patches.errors import BudgetError, RecipeError, ThinkKVError

DEBUG = "thinkkv.debug"
"""Key of the click context's ``meta`` that says whether ``--debug`` was given."""

COMMANDS = {
    "patch": ("thinkkv.sdk.cli.patch:patch", "Calibrate, verify and save a head profile for a model."),
    "generate": ("thinkkv.sdk.cli.generate:generate", "Generate text with a heterogeneous cache."),
    "train": ("thinkkv.sdk.cli.train:train", "Train a model to think shorter, stage by stage."),
    "eval": ("thinkkv.sdk.cli.eval:evaluate", "Measure what cache policies leave of a model's answers."),
    "bench": ("thinkkv.sdk.cli.bench:bench", "Measure speed and memory under cache policies."),
    "export": ("thinkkv.sdk.cli.export:export", "Export a model with its head classes: safetensors, ONNX or GGUF."),
    "run": ("thinkkv.sdk.cli.run:run", "Generate text from an ONNX bundle in plain ONNX Runtime."),
    "doctor": (
        "thinkkv.sdk.cli.doctor:doctor",
        "Show versions, devices, models, extras and what is supported.",
    ),
}
"""Name of a command: where it is, and its line in the help, which is written here so that ``--help`` imports none."""

REQUEST_ERRORS = (BudgetError, RecipeError)
"""Errors about a value that the user gave, found only after the command line was parsed."""


class FailedError(click.ClickException):
    """A failure as it is shown: one line, and an exit code."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print ``error: ...``."""
        click.echo(f"error: {self.message}", file=file, err=file is None)


class RequestError(FailedError):
    """The request was wrong."""

    exit_code = 2


class InterruptedByUserError(FailedError):
    """The user stopped it."""

    exit_code = 130


class LazyGroup(click.Group):
    """A group that imports a command when it is called, and turns failures into one line each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a first day, not the alphabet."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, and give it ``--debug``."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug_option(_start))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the group's own options."""
        try:
            return super().make_context(*args, **options)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            raise _request_error(error, self.name) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command.

        Raises:
            FailedError: it failed.
        """
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise _request_error(error, self.name) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            raise InterruptedByUserError("interrupted - run the command again to start over") from None
        except ThinkKVError as error:
            _trace(ctx)
            shown = RequestError if isinstance(error, REQUEST_ERRORS) else FailedError
            raise shown(str(error)) from error
        except Exception as error:
            _trace(ctx)
            raise FailedError(f"unexpected {type(error).__name__}: {error} - rerun with --debug") from error


def _request_error(error: click.UsageError, program: str | None) -> RequestError:
    command = error.ctx.command_path if error.ctx else program
    message = error.format_message().rstrip(". ")
    hint = "" if " - " in message else f" - see {command} --help"
    return RequestError(f"{message}{hint}")


def _trace(ctx: click.Context) -> None:
    if ctx.meta.get(DEBUG):
        click.echo(traceback.format_exc(), err=True, nl=False)


def _debug_option(then: Any) -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        callback=then,
        help="Show tracebacks, and the warnings and bars of the libraries.",
    )


def _note(ctx: click.Context, _parameter: click.Parameter, given: bool) -> None:
    """Remember ``--debug``; the contexts of group and command share ``meta``."""
    ctx.meta[DEBUG] = ctx.meta.get(DEBUG, False) or given


def _start(ctx: click.Context, parameter: click.Parameter, given: bool) -> None:
    """Remember ``--debug``, and quieten the libraries before the command imports any of them."""
    _note(ctx, parameter, given)
    from thinkkv.sdk.cli.console import quiet_libraries  # rich is not needed to print a help text

    quiet_libraries()


@click.group(
    name="thinkkv",
    cls=LazyGroup,
    params=[_debug_option(_note)],
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="`thinkkv COMMAND --help` shows a command's options and examples.",
)
@click.version_option(package_name="thinkkv", prog_name="thinkkv")
def main() -> None:
    """Patch Hugging Face models so that each KV head gets the cache it earns."""
