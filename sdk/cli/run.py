"""``thinkkv run``: generate from an exported bundle, without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thinkkv.sdk.cli.console import console, print_json, progress
from thinkkv.sdk.cli.options import json_option
from thinkkv.sdk.cli.text import echo, prompt_options, prompt_text, show_bytes


@click.command(
    epilog="""\b
Examples:
  thinkkv run thinkkv-out/export-smollm2-135m-onnx --prompt "Why is the sky blue?"
  cat report.txt | thinkkv run my-bundle --json"""
)
@click.argument("bundle", type=click.Path(path_type=Path))
@prompt_options
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime.  [default: its own choice]")
@click.option("--native", is_flag=True, help="Attend by operators in C: the bundle's own, or compiled here. Faster.")
@json_option
def run(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    threads: int | None,
    raw: bool,
    native: bool,
    as_json: bool,
) -> None:
    """Generate text from an ONNX bundle in plain ONNX Runtime.

    The bundle is held against its manifest first. The prompt comes from --prompt, --prompt-file or standard input.
    """
    from thinkkv.export.onnx.session import GRAPH_FILE
    from thinkkv.patches.errors import BundleError
    from thinkkv.sdk.manifest import verify

    with progress(f"checking {bundle}"):
        files = {file.path for file in verify(bundle)}
    if GRAPH_FILE not in files:
        raise BundleError(
            f"{bundle} is no ONNX bundle - a checkpoint runs with `thinkkv generate --model`, a GGUF file in llama.cpp"
        )
    text = prompt_text(prompt, prompt_file)
    from thinkkv.export.onnx.generate import generate_bundle

    done = generate_bundle(
        bundle,
        text,
        max_new_tokens=max_new_tokens,
        chat=not raw,
        threads=threads,
        native=native,
        echo=None if as_json else echo,
    ).as_json()
    if as_json:
        print_json(done)
    else:
        echo("\n")
    _show(done)


def _show(done: dict[str, Any]) -> None:
    """Speeds and bytes, on stderr."""
    seconds = done["seconds"]
    prefill = done["prompt_tokens"] / max(seconds["prefill"], 1e-9)
    decode = max(0, done["new_tokens"] - 1) / max(seconds["decode"], 1e-9)
    console.print(
        f"{done['prompt_tokens']} prompt tokens at {prefill:.0f}/s, {done['new_tokens']} new at {decode:.1f}/s",
        highlight=False,
    )
    show_bytes(done["bytes"])
