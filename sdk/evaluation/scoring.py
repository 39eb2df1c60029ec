"""Scores of answers, and how sure a mean of them is."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch

Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


def share_found(answers: Sequence[str], said: str) -> float:
    """Share of the answers that a text holds as whole words, case ignored (RULER's string match, but whole words)."""
    found = (re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said, re.IGNORECASE) for answer in answers)
    return sum(match is not None for match in found) / len(answers)


def loss(predicted: torch.Tensor, ids: Sequence[int]) -> float:
    """Mean negative log-likelihood of tokens in nats.

    Args:
        predicted: [T, V] log-probabilities.
        ids: the T tokens.
    """
    return -float(predicted.gather(1, torch.tensor(ids, device=predicted.device)[:, None]).mean())


def divergence(predicted: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of predictions from those of a reference, nats a token; both [T, V]."""
    return float((reference.exp() * (reference - predicted)).sum(dim=-1).mean().clamp(min=0))


def standard_error(values: Sequence[float], texts: Sequence[Hashable]) -> float:
    """Of the mean of samples, of which those of one text may be alike; NaN where there is only one text.

    The sandwich estimate for clusters: each text counts by the sum of its deviations from the mean. Where every sample
    has a text of its own it is the usual one.

    Args:
        values: of the samples.
        texts: what each sample is about.
    """
    mean = math.fsum(values) / len(values)
    deviations: defaultdict[Hashable, float] = defaultdict(float)
    for value, text in zip(values, texts, strict=True):
        deviations[text] += value - mean
    if len(deviations) == 1:
        return math.nan
    correction = len(deviations) / (len(deviations) - 1)
    return math.sqrt(correction * math.fsum(sum_**2 for sum_ in deviations.values())) / len(values)


def effective_count(scores: Sequence[float], texts: Sequence[Hashable]) -> float:
    """How many samples of different texts would tell as much: between the numbers of texts and of samples.

    Kish's design effect, as Korn and Graubard use it for intervals of shares (Survey Methodology 24, 1998). Where all
    scores are equal nothing tells how much samples of one text are alike: then each text counts once.
    """
    samples, different = len(scores), len(set(texts))
    if different == samples:
        return samples
    if different == 1 or len(set(scores)) == 1:
        return different
    effect = (standard_error(scores, texts) / standard_error(scores, range(samples))) ** 2
    return min(samples, max(different, samples / effect if effect else samples))


def wilson(mean: float, count: float) -> tuple[float, float]:
    """The Wilson 95 % interval of a share.

    For scores between 0 and 1 it is on the safe side: none varies more than right and wrong do.

    Args:
        mean: of the scores, 0 to 1.
        count: of independent samples, 1 or more.
    """
    spread = Z95**2 / count
    center = (mean + spread / 2) / (1 + spread)
    half = Z95 * math.sqrt(mean * (1 - mean) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, center - half), min(1.0, center + half)


def perplexity(losses: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Perplexity of mean losses per passage, and its 95 % interval (normal in the mean loss); None for one passage.

    Args:
        losses: mean negative log-likelihood of each passage, nats; all passages are of one length.
    """
    mean = math.fsum(losses) / len(losses)
    if len(losses) < 2:
        return math.exp(mean), None
    variance = math.fsum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1)
    half = Z95 * math.sqrt(variance / len(losses))
    return math.exp(mean), (math.exp(mean - half), math.exp(mean + half))
