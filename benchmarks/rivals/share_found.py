"""The score of an answer, as in thinkkv's own tasks, for rivals that have nothing of thinkkv."""

from __future__ import annotations

import re
from collections.abc import Sequence


def share_found(answers: Sequence[str], said: str) -> float:
    """Share of the answers that a text holds as whole words, case ignored."""
    found = [re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said, re.IGNORECASE) for answer in answers]
    return sum(match is not None for match in found) / len(found)
