"""Filler prose: an endless, seeded stream of different plain sentences about daily life in a valley.

Facts of a task are hidden in it, so it holds no digits and none of the words that a task asks for. Sentences are filled
templates, written for this project: RULER's one repeated sentence is too easy, and essays under a licence do not ship.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence

TEMPLATES: Sequence[str] = (
    "The {adjective} {thing} by the {spot} was {done} {when}.",
    "{when_start}, {people} met near the {spot} and talked about the {weather}.",
    "Nobody could say why the {thing} had been left beside the {spot}.",
    "{people_start} preferred to walk home {manner}, past the {spot} and along the hedges.",
    "There was {weather} over the fields, and {people} stayed indoors with {food}.",
    "A {adjective} dog slept under the table while {people} played cards {manner}.",
    "It is said that the {spot} was older than any house in the valley.",
    "{when_start}, the smell of {food} drifted {manner} across the yard.",
    "The carpenter repaired the {thing} and asked for nothing but {food}.",
    "Children counted the geese on the {spot} until somebody called them in.",
    "{people_start} had a long argument about how to cook {food} properly.",
    "After the {weather}, the path to the {spot} was {adjective} and slow to dry.",
    "The {thing} creaked whenever the wind turned, which happened {when}.",
    "Somebody painted the {thing} a {adjective} colour and was never found out.",
    "{when_start}, a letter arrived that described a distant coast and its {weather}.",
    "The old clock in the hall ran {manner}, and {people} had grown used to it.",
    "Sheep wandered {manner} between the {spot} and the orchard.",
    "{people_start} carried {food} in baskets to the far end of the {spot}.",
    "A traveller asked for directions and was sent {manner} toward the {spot}.",
    "The baker opened late because of the {weather} and nobody complained.",
    "{when_start}, the river rose a little and then went back to its bed.",
    "Two cats watched the {thing} as if it were about to move.",
    "On the shelf stood a {adjective} bowl, and beside it some {food}.",
    "{people_start} learned to mend nets, although the sea was far away.",
    "The schoolroom was {adjective} in winter and bright in the longer months.",
    "Most of the {food} was eaten before {people} came back from the {spot}.",
    "The {weather} lasted so long that even the crows seemed tired of it.",
    "Whoever crossed the {spot} in the evening heard music from an open window.",
    "{when_start}, the mayor gave a {adjective} speech and thanked {people} for listening.",
    "The {thing} was sold at the fair and replaced by another one just like it.",
    "Moss grew {manner} over the stones near the {spot}.",
    "{people_start} kept a diary in which the {weather} was noted every day.",
    "At the inn they served {food} and a soup that tasted of smoke.",
    "A {adjective} wagon stood in the lane, and {people} wondered whose it was.",
    "The beekeeper moved the hives {manner} because of the {weather}.",
    "{when_start}, somebody rang the bell by mistake and everybody laughed.",
    "The road beyond the {spot} bends twice before it reaches the hills.",
    "Without the {thing}, the whole room would have looked {adjective} and empty.",
    "{people_start} gathered wood {when} and stacked it {manner} against the wall.",
    "The postman knew a shortcut through the {spot}, but it was {adjective}.",
    "Swallows nested above the door, so {people} used the other entrance.",
    "The {weather} came {manner}, and the washing was brought in at once.",
    "A story went round that the {thing} had once belonged to a famous singer.",
    "{when_start}, lamps were lit along the {spot} and the talk grew quieter.",
    "The gardener planted beans where the {thing} used to stand.",
    "Of all the walks in the valley, the one by the {spot} was liked best.",
    "{people_start} baked {food} for the feast, and some of it was even good.",
    "The ferry had been {adjective} for as long as anybody could remember.",
)

WORDS: Mapping[str, Sequence[str]] = {
    "adjective": (
        "quiet", "heavy", "narrow", "pale", "crooked", "warm", "dusty", "gentle", "rough", "plain", "damp", "sturdy",
        "faded", "hollow", "clumsy", "cheerful", "shallow", "tidy", "worn", "curious",
    ),
    "thing": (
        "bench", "ladder", "cart", "stove", "curtain", "barrel", "fence", "cupboard", "wheelbarrow", "anvil", "loom",
        "saddle", "shutter", "weather vane", "rocking chair", "trough", "wardrobe", "bellows", "sledge", "signpost",
    ),
    "spot": (
        "old mill", "churchyard", "stone bridge", "market square", "pond", "chapel", "footpath", "orchard wall",
        "quarry", "meadow", "village green", "ford", "crossroads", "hay barn", "vineyard", "watchtower", "spring",
    ),
    "people": (
        "the neighbours", "two brothers", "the miller and his wife", "a few shepherds", "the older pupils",
        "some visitors", "the weavers", "a group of students", "the farmhands", "three aunts", "the choir",
        "a pair of hunters", "the widow and her sons", "several clerks", "the fishermen", "the twins",
    ),
    "weather": (
        "thin fog", "steady rain", "early frost", "dry heat", "soft snow", "low clouds", "a warm wind", "hail",
        "evening mist", "a long drought", "thunder", "bright moonlight",
    ),
    "food": (
        "rye bread", "plum cake", "boiled eggs", "roasted chestnuts", "goat cheese", "onion pie", "cold porridge",
        "pickled beets", "honey biscuits", "smoked trout", "lentil stew", "pear jam", "buttered turnips",
    ),
    "when": (
        "in late spring", "before breakfast", "on market days", "after the harvest", "every other week",
        "toward evening", "during the holidays", "at the end of winter", "long ago", "most mornings",
    ),
    "manner": (
        "slowly", "without any hurry", "in single file", "in great haste", "as usual", "rather carelessly",
        "with some effort", "in silence", "here and there", "little by little",
    ),
    "done": (
        "mended", "forgotten", "admired", "moved indoors", "covered with cloth", "borrowed", "polished", "taken apart",
        "given away", "found again",
    ),
}  # fmt: skip


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences; every template comes up once before any comes again."""
    while True:
        for template in rng.sample(TEMPLATES, len(TEMPLATES)):
            yield _fill(template, rng)


def vocabulary() -> frozenset[str]:
    """All words that filler can hold, lower case; a task's own words must not be among them."""
    texts = [*TEMPLATES, *(word for words in WORDS.values() for word in words)]
    return frozenset(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", " ".join(texts)).lower()))


def _fill(template: str, rng: random.Random) -> str:
    def word(slot: re.Match[str]) -> str:
        name = slot[1].removesuffix("_start")
        chosen = rng.choice(WORDS[name])
        return chosen[0].upper() + chosen[1:] if slot[1].endswith("_start") else chosen

    return re.sub(r"\{(\w+)\}", word, template)
