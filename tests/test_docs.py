"""What the pages say can be followed: links lead somewhere, and commands can be copied and have these options."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
from markdown_it import MarkdownIt

from thinkkv.sdk.cli import COMMANDS, main
from thinkkv.sdk.cli.compared import numbers
from thinkkv.sdk.cli.export import EXPORT_POLICIES
from thinkkv.sdk.evaluation.setting import parse_policy
from thinkkv.sdk.evaluation.tasks import is_known
from thinkkv.sdk.policies import POLICIES
from thinkkv.sdk.speed.torch_contender import STOCK

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
SHELL = ("", "sh", "bash", "console")
"""How a code block is marked that holds commands."""
FOLDERS = ("benchmarks", "docs", "export", "kernels", "patches", "recipes", "sdk", "tests")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Line:
    """A line of code.

    Args:
        page: where.
        text: with the lines that continue it.
        inline: it stands in a sentence, not in a block of its own.
    """

    page: str
    text: str
    inline: bool

    @property
    def is_synopsis(self) -> bool:
        """It shows what options there are, in brackets."""
        return "[-" in self.text

    def __str__(self) -> str:
        return f"{self.page}: {self.text[:80]}"


@cache
def tokens(page: Path) -> Sequence[Any]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def spans(page: Path) -> Iterator[Any]:
    """Everything that stands within a line of text: words, code, links."""
    return (span for token in tokens(page) for span in token.children or ())


def lines(page: Path) -> Iterator[Line]:
    """Code of a page, in blocks and in sentences."""
    name = str(page.relative_to(ROOT))
    for token in tokens(page):
        if token.type in ("fence", "code_block") and token.info in SHELL:
            yield from (Line(name, text, inline=False) for text in joined(token.content))
    yield from (Line(name, span.content, inline=True) for span in spans(page) if span.type == "code_inline")


def joined(block: str) -> list[str]:
    """Lines of a block; one that is indented, or follows a backslash, continues the one before."""
    found: list[str] = []
    continues = False
    for line in block.splitlines():
        text = line.removesuffix("\\").strip()
        if found and (continues or line.startswith(" ")):
            found[-1] += " " + text
        else:
            found.append(text)
        continues = line.endswith("\\")
    return found


EVERYTHING = [line for page in PAGES for line in lines(page)]
CALLED = re.compile(r"(^|.* -m )thinkkv(\.sdk\.cli)? ")
"""What stands before a command of ``thinkkv``: perhaps a launcher."""
OURS = [line for line in EVERYTHING if CALLED.match(line.text)]
SYNOPSES = [line for line in OURS if line.is_synopsis and not line.inline]
TO_COPY = [line for line in OURS if not line.is_synopsis and not line.inline]
SCRIPTS = [line for line in EVERYTHING if re.search(r"\bpython (benchmarks/|-m thinkkv\.)", line.text)]


def command_and_rest(line: Line) -> tuple[click.Command, str]:
    """A command of ``thinkkv``, or ``thinkkv`` itself, and what it is given."""
    given = CALLED.sub("", line.text)
    name, _, rest = given.partition(" ")
    if name.startswith("-"):
        return main, given
    command = main.get_command(click.Context(main), name)
    assert command is not None, f"there is no command {name!r}"
    return command, rest


def options_of(command: click.Command) -> dict[str, click.Option]:
    """By every spelling."""
    found = [one for one in command.get_params(click.Context(command)) if isinstance(one, click.Option)]
    return {spelling: one for one in found for spelling in (*one.opts, *one.secondary_opts)}


def split(names: str | None) -> list[str]:
    return names.split(",") if names else []


# Links


def targets(page: Path) -> Iterator[str]:
    for span in spans(page):
        target = {"link_open": span.attrGet("href"), "image": span.attrGet("src")}.get(span.type)
        if target is not None and "://" not in str(target):
            yield str(target)


@cache
def anchors(page: Path) -> frozenset[str]:
    """Of a page's headings, as GitHub makes them."""
    found: list[str] = []
    seen = Counter[str]()
    for token, inline in pairwise(tokens(page)):
        if token.type == "heading_open":
            text = "".join(span.content for span in inline.children if span.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return frozenset(found)


def leads_somewhere(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    return file.is_relative_to(ROOT) and file.exists() and (not anchor or anchor in anchors(file))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in targets(page) if not leads_somewhere(page, target)] == []


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `--flag`, 2,000 tokens\n\n## What's *here*?\n\n## What's here?\n\n    # code\n")
    assert anchors(page) == {"a---flag-2000-tokens", "whats-here", "whats-here-1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_code_names_exist(page: Path) -> None:
    named = [pair for line in lines(page) for pair in pairwise(["", *line.text.split()])]
    read = {word for before, word in named if before != "--out" and word.partition("/")[0] in FOLDERS and "/" in word}
    paths = {word for word in read if re.fullmatch(r"[\w./-]+", word)}  # no patterns and placeholders
    assert {path for path in paths if not (ROOT / path).exists()} == set()


# Commands of thinkkv


@pytest.mark.parametrize("line", OURS, ids=str)
def test_commands_and_options_exist(line: Line) -> None:
    command, rest = command_and_rest(line)
    assert {*OPTION.findall(rest)} - {*options_of(command)} == set()


@pytest.mark.parametrize("line", TO_COPY, ids=str)
def test_a_command_is_understood(line: Line) -> None:
    """It has what it needs, choices and numbers are those that its command takes, policies and tasks exist."""
    command, rest = command_and_rest(line)
    given = command.make_context(command.name, shlex.split(rest, comments=True)).params
    assert all(parse_policy(policy) for policy in split(given.get("policies")) if policy != STOCK)
    assert [task for task in split(given.get("tasks")) if not is_known(task)] == []
    for option, kind in (("ratio", float), ("contexts", int), ("threads", int)):
        if isinstance(given.get(option), str):
            assert numbers(given[option], f"--{option}", kind)


@pytest.mark.parametrize("line", SYNOPSES, ids=str)
def test_a_synopsis_names_every_option_and_choice(line: Line) -> None:
    command, rest = command_and_rest(line)
    options = options_of(command)
    named = {options[spelling].name for spelling in OPTION.findall(rest)}
    unnamed = {spelling for spelling, option in options.items() if option.name not in named}
    assert unnamed - {"-h"} == {"--debug", "--help"}  # a command has -h only once it was called by `thinkkv`
    for spelling, choices in re.findall(r"(--[a-z-]+) ([a-z0-9]+(?:\|[a-z0-9-]+)+)", rest):
        kind = options[spelling].type
        assert isinstance(kind, click.Choice)
        assert choices.split("|") == list(kind.choices)


def test_every_command_has_a_synopsis() -> None:
    assert {command_and_rest(line)[0].name for line in SYNOPSES} == {*COMMANDS} - {"train"}  # its page has a table


# Nothing that keeps a command from being copied


@pytest.mark.parametrize("line", [line for line in (*OURS, *SCRIPTS) if not line.is_synopsis], ids=str)
def test_no_dots_stand_for_values(line: Line) -> None:
    """A quoted prompt aside."""
    words = shlex.split(line.text, comments=True, posix=False)  # with their quotes
    assert [word for word in words if "..." in word and word[0] not in "\"'"] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_is_a_fragment(page: Path) -> None:
    """Several options in a sentence need their command before them."""
    fragments = [line.text for line in lines(page) if line.inline and re.match(r"--[a-z-]+ \S+ --[a-z-]+", line.text)]
    assert fragments == []


# Scripts


@cache
def script_options(path: Path) -> dict[str, bool]:
    """Options of a script, and of what it imports from beside it: whether they are required."""
    found: dict[str, bool] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        beside = path.with_name(f"{node.module}.py") if isinstance(node, ast.ImportFrom) else path
        if beside != path and beside.exists():
            found |= dict.fromkeys(script_options(beside), False)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            required = any(keyword.arg == "required" for keyword in node.keywords)
            found |= {name.value: required for name in node.args if isinstance(name, ast.Constant)}
    return found


def script_and_options(line: Line) -> tuple[Path, set[str]]:
    """A script, by its path or as a module, and the options that it is given."""
    words = shlex.split(line.text, comments=True)
    at = next(i for i, word in enumerate(words) if Path(word).name == "python") + 1
    if words[at] != "-m":
        return ROOT / words[at], set(OPTION.findall(" ".join(words[at:])))
    spec = importlib.util.find_spec(words[at + 1])
    assert spec is not None
    return Path(str(spec.origin)), set(OPTION.findall(" ".join(words[at + 1 :])))


@pytest.mark.parametrize("line", SCRIPTS, ids=str)
def test_scripts_have_these_options(line: Line) -> None:
    path, given = script_and_options(line)
    options = script_options(path)
    if "lm_eval" not in path.read_text(encoding="utf-8"):  # else it has the options of another program
        assert given - set(options) == set()
    assert {name for name, required in options.items() if required and name.startswith("--")} - given == set()


def test_the_table_of_policies_says_what_each_of_them_needs() -> None:
    lines = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8").split("## What each of them needs")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines() if line[:3] == "| `"]
    expected = []
    for name, policy in POLICIES.items():
        optional = ", optional" if name == "task-kv" else ""
        profile = f"`{policy.profile_score}`{optional}" if policy.profile_score else ""
        holds, exported = ("yes" if found else "" for found in (policy.compares_layers, name in EXPORT_POLICIES))
        expected.append([f"`{name}`", profile, "twice" if policy.rehearses else "once", holds, exported])
    assert [[name, *needs] for name, _, *needs in rows] == expected
