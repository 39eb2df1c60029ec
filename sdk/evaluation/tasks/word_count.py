"""Word count: a long list of words, in which a few come up far more often than the others (RULER's common words)."""

from __future__ import annotations

import random

from thinkkv.sdk.evaluation.sample import Layout, Sample

WORDS = (
    "acorn", "badger", "basket", "blanket", "bottle", "button", "candle", "carpet", "castle", "cherry", "coffee",
    "cotton", "desert", "donkey", "engine", "fabric", "feather", "flower", "forest", "garlic", "guitar", "harbor",
    "hunter", "island", "jacket", "jungle", "kettle", "ladder", "lemon", "marble", "meadow", "mirror", "monkey",
    "needle", "oyster", "paddle", "pencil", "pepper", "pillow", "planet", "pocket", "rabbit", "ribbon", "saddle",
    "salmon", "shovel", "spider", "squirrel", "tiger", "timber", "tunnel", "turtle", "velvet", "walnut", "window",
)  # fmt: skip
COMMON = 3
COMMON_SHARE = 0.5
"""Of the list, the rest is spread over all other words."""


def word_count(rng: random.Random) -> Layout:
    """Half of the list are three words in equal parts; asked are these three."""
    words = rng.sample(WORDS, len(WORDS))
    common, rare = words[:COMMON], words[COMMON:]
    seed = rng.random()

    def layout(pieces: int) -> Sample:
        often = max(2, round(pieces * COMMON_SHARE / COMMON))
        listed = [word for word in common for _ in range(often)]
        listed += [rare[i % len(rare)] for i in range(pieces - COMMON * often)]
        random.Random(seed).shuffle(listed)
        return Sample(
            "In the following list of words, some come up more often than the others. "
            "Remember the most common ones.\n\n" + ", ".join(listed),
            f".\n\nWhich words are the most common in the list? The {COMMON} most common words are",
            tuple(common),
        )

    return layout
