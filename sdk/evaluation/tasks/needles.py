"""Needles in a haystack: special numbers hidden in prose, one of them or all of one key asked for (RULER's NIAH).

RULER is arXiv:2404.06654. Ours differ in the prose, which does not repeat, and in numbers of five digits
instead of seven.
"""

from __future__ import annotations

import random

from thinkkv.sdk.evaluation.sample import Layout, scattered

COLOURS = ("copper", "crimson", "golden", "indigo", "ivory", "emerald", "scarlet", "silver", "turquoise", "violet")
OBJECTS = ("anchor", "compass", "dragon", "falcon", "helmet", "lantern", "mirror", "parrot", "pyramid", "telescope")
KEYS = 4
OPENING = "Some special numbers are hidden in the following text. Remember them."


def niah_single(rng: random.Random) -> Layout:
    """One key with one number."""
    return _needles(rng, keys=1, values=1)


def niah_multikey(rng: random.Random) -> Layout:
    """Four keys with a number each, one of them asked for."""
    return _needles(rng, keys=KEYS, values=1)


def niah_every_key(rng: random.Random, asked: int) -> Layout:
    """The same, each of the keys asked for in turn."""
    return _needles(rng, keys=KEYS, values=1, asked=asked)


def niah_multivalue(rng: random.Random) -> Layout:
    """One key with three numbers in three places, all asked for."""
    return _needles(rng, keys=1, values=3)


def passkey(rng: random.Random) -> Layout:
    """A pass key that the text says to remember (arXiv:2305.16300)."""
    (number,) = numbers(rng, 1)
    return scattered(
        rng,
        [f"The pass key is {number}. Remember it."],
        "\n\nWhat is the pass key? The pass key is",
        [number],
        opening="There is important information hidden in the following text. Find it and remember it.",
    )


def numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(number) for number in rng.sample(range(10_000, 100_000), count)]


def _needles(rng: random.Random, *, keys: int, values: int, asked: int = 0) -> Layout:
    pairs = zip(rng.sample(COLOURS, keys), rng.sample(OBJECTS, keys), strict=True)
    names = [f"{colour} {thing}" for colour, thing in pairs]
    found = numbers(rng, keys * values)
    needles = [f"The special number of the {names[i // values]} is {number}." for i, number in enumerate(found)]
    facts = rng.sample(needles, len(needles))
    wanted = found[asked * values : (asked + 1) * values]
    in_order = [number for fact in facts for number in wanted if number in fact]
    return scattered(rng, facts, _question(names[asked], values), wanted, opening=OPENING, worked=", ".join(in_order))


def _question(key: str, values: int) -> str:
    if values == 1:
        return f"\n\nWhat is the special number of the {key}? The special number of the {key} is"
    return f"\n\nWhat are all the special numbers of the {key}? The {values} special numbers of the {key} are"
