"""A procedural reasoning task whose traces mix critical and redundant steps of known kinds.

A problem gives a start value and labelled operations modulo 5: ``3 ; a +1 ; b *2 ; ?``. A trace writes one *detail*
step per operation (`` a : 3 +1 = 4``) or only its result in a *compressed* step (`` a = 4``), where the writer slips
more often; *redundant* steps recheck, restate or hesitate and carry nothing. It is built so that methods of
shortening can be told apart:

- redundancy causes no error, so accuracy alone does not remove it;
- a compressed step is tempting to a penalty on length, mostly right on easy problems and less so on hard ones;
- easy problems (short, additions) and hard ones (long, with products) are mixed.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from thinkkv.patches.errors import RecipeError

THINK, END_THINK, EOS, PAD, BREAK = "<think>", "</think>", "<eos>", "<pad>", "\n\n"
LABELS = string.ascii_lowercase
WORDS = ("wait", "ok", "so", "is", "now", "hmm", "let", "me", "see")
SYMBOLS = (";", "?", ":", "=")
EASY, HARD = ("+1", "+2", "-1"), ("+1", "+2", "-1", "*2", "*3", "*4")
MODULUS = 5

StepKind = Literal["detail", "compressed", "redundant"]
CRITICAL: frozenset[StepKind] = frozenset({"detail", "compressed"})


@dataclass(frozen=True)
class Problem:
    """A start digit and operations on it.

    Args:
        start: first value.
        operations: operator and operand of each label in turn.
        hard: whether it was drawn from the hard half.
    """

    start: int
    operations: tuple[str, ...]
    hard: bool

    @property
    def values(self) -> list[int]:
        """The value before the first operation and after each."""
        found = [self.start]
        for operation in self.operations:
            found.append(_apply(found[-1], operation))
        return found

    @property
    def answer(self) -> str:
        """The last value."""
        return str(self.values[-1])

    @property
    def prompt(self) -> str:
        """The text that the model is given; the reasoning is opened by it."""
        operations = "".join(
            f" ; {label} {operation}" for label, operation in zip(LABELS, self.operations, strict=False)
        )
        return f" {self.start}{operations} ; ?{THINK}"


@dataclass(frozen=True)
class Lengths:
    """Fewest and most operations of a problem.

    Args:
        easy: of the easy half.
        hard: of the hard half.
    """

    easy: tuple[int, int] = (2, 3)
    hard: tuple[int, int] = (4, 6)

    def __post_init__(self) -> None:
        for fewest, most in (self.easy, self.hard):
            if not 1 <= fewest <= most <= len(LABELS):
                raise ValueError(f"[{fewest}, {most}] are no numbers of operations from 1 to {len(LABELS)}, in order")

    @property
    def labels(self) -> str:
        """As many as the longest problem has operations, and at least eight."""
        return LABELS[: max(8, self.easy[1], self.hard[1])]


@dataclass(frozen=True)
class Style:
    """How a trace is written; probabilities.

    Args:
        redundancy: that a further redundant step follows, after every step.
        compression: that an operation's result is written alone.
        easy_slip: that a compressed step of an easy problem is wrong, and with it the rest.
        hard_slip: the same for a hard problem.
    """

    redundancy: float = 0.55
    compression: float = 0.05
    easy_slip: float = 0.04
    hard_slip: float = 0.12


def options(given: Mapping[str, Any]) -> tuple[Lengths, Style]:
    """What a recipe's ``data.options`` say, by the names of both.

    Raises:
        RecipeError: a name that neither has, or impossible lengths.
    """
    names = {field.name for field in fields(Lengths)}
    try:
        lengths = Lengths(**{name: tuple(pair) for name, pair in given.items() if name in names})
        return lengths, Style(**{name: value for name, value in given.items() if name not in names})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"data.options: {error} - see recipes/tasks/running_value.py") from None


def draw(rng: random.Random, lengths: Lengths = Lengths()) -> Problem:
    """One problem, easy or hard with equal probability."""
    hard = rng.random() < 0.5
    count = rng.randint(*(lengths.hard if hard else lengths.easy))
    operations = tuple(rng.choice(HARD if hard else EASY) for _ in range(count))
    return Problem(rng.randrange(MODULUS), operations, hard)


def trace(problem: Problem, rng: random.Random, style: Style) -> str:
    """A chain of thought and its answer; right unless a compressed step slips."""
    steps, value = list[str](), problem.start
    slip = style.hard_slip if problem.hard else style.easy_slip
    for label, operation in zip(LABELS, problem.operations, strict=False):
        before, value = value, _apply(value, operation)
        if rng.random() < style.compression:
            if rng.random() < slip:
                value = (value + rng.randrange(1, MODULUS)) % MODULUS
            steps.append(f" {label} = {value}")
        else:
            steps.append(f" {label} : {before} {operation} = {value}")
        while rng.random() < style.redundancy:
            steps.append(_redundant(rng, label, value, steps[-1]))
    return "".join(step + BREAK for step in steps) + f"{END_THINK} {value}{EOS}"


def step_kind(step: str) -> StepKind:
    """What a step is, by its form alone."""
    if re.fullmatch(r" [a-z] : \d [-+*]\d = \d", step.strip("\n")):
        return "detail"
    if re.fullmatch(r" [a-z] = \d", step.strip("\n")):
        return "compressed"
    return "redundant"


def answer_of(completion: str) -> str | None:
    """The digit after the reasoning, if the completion ends with one."""
    found = re.search(rf"{END_THINK} (\d)(?:{EOS})?$", completion)
    return found.group(1) if found else None


def rows(count: int, seed: int, style: Style | None = None, lengths: Lengths = Lengths()) -> list[dict[str, str]]:
    """Problems as data rows; with a style, also a trace each.

    Args:
        count: how many.
        seed: of problems and traces.
        style: how the traces are written; None for prompts and answers alone.
        lengths: of the problems.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        problem = draw(rng, lengths)
        row = {"prompt": problem.prompt, "answer": problem.answer, "level": "hard" if problem.hard else "easy"}
        found.append(row if style is None else row | {"completion": trace(problem, rng, style)})
    return found


def tokenizer(lengths: Lengths = Lengths()) -> Any:
    """One token a word, sign or digit, each with its space before it, so that texts join without loss.

    Args:
        lengths: of the problems; they decide how many labels it knows.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f" {word}" for word in (*WORDS, *SYMBOLS, *HARD, *lengths.labels, *map(str, range(MODULUS)))]
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, THINK, END_THINK, BREAK, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n\n|</?think>|<eos>|<pad>| [^ \n<]+"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left")


def _apply(value: int, operation: str) -> int:
    operand = int(operation[1:])
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[operation[0]] % MODULUS


def _redundant(rng: random.Random, label: str, value: int, previous: str) -> str:
    kinds: Sequence[str] = (f" so {label} is {value} now", " hmm let me see", f" wait {label} is {value} ok")
    if step_kind(previous) == "detail":
        kinds = (*kinds, f" wait{previous} ok")
    return rng.choice(kinds)


def mean_kinds(completions: Iterable[str]) -> dict[StepKind, float]:
    """Steps of each kind per completion."""
    counts: dict[StepKind, int] = {"detail": 0, "compressed": 0, "redundant": 0}
    total = 0
    for completion in completions:
        total += 1
        for step in completion.split(END_THINK)[0].split(BREAK):
            if step:
                counts[step_kind(step)] += 1
    return {kind: count / max(1, total) for kind, count in counts.items()}
