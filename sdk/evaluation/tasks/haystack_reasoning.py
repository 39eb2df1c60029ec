"""Reasoning in a haystack: two facts of a small story, scattered in prose, answer a question together.

After BABILong (arXiv:2406.10149) and the second bAbI task; people, objects and places are ours.
"""

from __future__ import annotations

import random

from thinkkv.sdk.evaluation.sample import Layout, scattered

PEOPLE = ("Anna", "Bruno", "Clara", "David", "Elsa", "Felix")
OBJECTS = ("apple", "football", "hammer", "umbrella", "violin", "newspaper")
PLACES = ("kitchen", "library", "garage", "bathroom", "office", "cellar")
STORIES = 3
EXAMPLE = "The key is with Greta. Greta is in the attic."
"""How to answer: both facts, one after the other; a small model cannot join them unsaid."""


def haystack_reasoning(rng: random.Random) -> Layout:
    """Who has what, and who is where; asked is where a thing is."""
    people, objects, places = (rng.sample(words, STORIES) for words in (PEOPLE, OBJECTS, PLACES))
    facts = [f"The {what} is with {who}." for who, what in zip(people, objects, strict=True)]
    facts += [f"{who} is in the {where}." for who, where in zip(people, places, strict=True)]
    asked = rng.randrange(STORIES)
    return scattered(
        rng,
        rng.sample(facts, len(facts)),
        f"\n\nWhere is the key? {EXAMPLE}\nWhere is the {objects[asked]}? The {objects[asked]} is with",
        [places[asked]],
        worked=f"{people[asked]}. {people[asked]} is in the {places[asked]}.",
        opening="Some people in the following text have things with them. Remember where they are.",
    )
