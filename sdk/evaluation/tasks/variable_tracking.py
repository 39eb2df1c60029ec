"""Variable tracking: assignments scattered in prose form chains; asked are all variables of one value (RULER)."""

from __future__ import annotations

import random
import string

from thinkkv.sdk.evaluation.sample import Layout, scattered
from thinkkv.sdk.evaluation.tasks.needles import numbers

HOPS = 2
CHAINS = 2
EXAMPLE = "VAR QQQQQ = 777. VAR RRRRR = VAR QQQQQ. VAR SSSSS = VAR RRRRR. So they are QQQQQ, RRRRR, SSSSS."
"""How to answer: the chain, link by link."""


def variable_tracking(rng: random.Random) -> Layout:
    """Two chains of three variables; RULER has one chain of five, and names of five letters as here."""
    names = ["".join(letters) for letters in _names(rng, CHAINS * (HOPS + 1))]
    values = numbers(rng, CHAINS)
    chains = [names[i * (HOPS + 1) : (i + 1) * (HOPS + 1)] for i in range(CHAINS)]
    links = [_links(chain, value) for chain, value in zip(chains, values, strict=True)]
    facts = [links[chain][hop] for hop in range(HOPS + 1) for chain in range(CHAINS)]
    return scattered(
        rng,
        facts,
        f"\n\nWhich variables have the value 777? {EXAMPLE}\nWhich variables have the value {values[0]}? VAR",
        chains[0],
        worked=" ".join([*links[0], *chains[0]]),
        opening="Variables are assigned in the following text. Remember which variable has which value.",
    )


def _links(chain: list[str], value: str) -> list[str]:
    """A value for the first variable, the variable before for each other one."""
    sources = [value, *(f"VAR {name}" for name in chain)]
    return [f"VAR {name} = {source}." for name, source in zip(chain, sources, strict=False)]


def _names(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(found)
