"""The online step-importance estimator: how much later text hangs on a step, by the policy's own log-probabilities.

For step j of a response (prompt p, steps s, answer a), in nats:

- ``next-steps`` (default): ``log P(t | p, s_<=j) - log P(t | p, s_<j)`` with t = the next ``window`` steps, and the
  answer where the window reaches the end. Leave-one-out on what follows;
- ``answer-removal``: ``log P(a | p, s) - log P(a | p, s without j)``, the log-ratio form of PIR (arXiv:2505.19187);
- ``prefix-gain``: ``log P(a | p, s_<=j) - log P(a | p, s_<j)``, the on-policy gain of SwAP (arXiv:2603.00296).

SmartThinker (arXiv:2507.04348) names an online estimator and gives no formula: the three forms, the window and the
answer being the response's own are this project's choices. All are teacher-forced at temperature 1 without sampling.

*Packed* scoring appends each counterfactual tail to the response as a masked branch with shifted positions, so that one
forward with a 4-D mask replaces two forwards a step: ``L + sum(tails)`` tokens. ``score_naive`` is the plain form.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from thinkkv.recipes.smartthinker.steps import Steps

Estimator = Literal["next-steps", "answer-removal", "prefix-gain"]
CRITICAL_FROM = 0.5
"""A step counts as critical when its weight reaches this."""

ESTIMATORS: tuple[Estimator, ...] = ("next-steps", "answer-removal", "prefix-gain")


@dataclass(frozen=True)
class Branch:
    """A continuation that the response did not take.

    Args:
        visible: how many leading tokens of prompt + response it sees.
        ids: its tokens.
        scored: how many of its last tokens are scored.
    """

    visible: int
    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Probe:
    """What must be scored to know the importance of one response's steps.

    Args:
        ids: prompt and response.
        spans: token ranges of ``ids`` whose own log-probability is needed, one a step.
        branches: counterfactual continuations, one a step.
        gains: per step, indices of the two scores that are subtracted; spans come first, then branches.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    branches: tuple[Branch, ...]
    gains: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Length of its packed form."""
        return len(self.ids) + sum(len(branch.ids) for branch in self.branches)


def probe(
    prompt: Sequence[int], response: Sequence[int], steps: Steps, *, estimator: Estimator, window: int = 2
) -> Probe:
    """Lay out what to score for one response.

    Args:
        prompt: its prompt's tokens, at least one.
        response: its tokens.
        steps: how it splits.
        estimator: which importance.
        window: how many following steps ``next-steps`` looks at.
    """
    ids, offset = (*prompt, *response), len(prompt)
    if estimator == "prefix-gain":
        return _prefix_probe(ids, offset, steps)
    spans, branches = [], []
    for index, (start, end) in enumerate(steps.spans):
        stop = len(response)
        if estimator == "next-steps" and index + window < len(steps.spans):
            stop = steps.spans[index + window][1]
        tail = tuple(response[end:stop])
        scored = len(tail) if estimator == "next-steps" else stop - steps.answer_start
        spans.append((offset + stop - scored, offset + stop))
        branches.append(Branch(offset + start, tail, scored))
    count = len(spans)
    return Probe(ids, tuple(spans), tuple(branches), tuple((index, count + index) for index in range(count)))


def _prefix_probe(ids: tuple[int, ...], offset: int, steps: Steps) -> Probe:
    """The answer after every prefix of the steps; after all of them it is the response's own."""
    answer = ids[offset + steps.answer_start :]
    branches = tuple(Branch(offset + start, answer, len(answer)) for start, _ in steps.spans)
    own = ((offset + steps.answer_start, len(ids)),)
    order = [*range(1, 1 + len(branches)), 0]
    return Probe(ids, own, branches, tuple((order[index + 1], order[index]) for index in range(len(branches))))


@torch.no_grad()
def score_packed(model: Any, probes: Sequence[Probe], *, max_tokens: int = 4096) -> list[list[float]]:
    """Importance of every step of several responses, each in one row of a packed forward.

    Args:
        model: a causal LM whose attention takes 4-D masks (``takes_masks``); call it in evaluation mode.
        probes: from ``probe``.
        max_tokens: padded tokens in one forward; a longer single response still goes in one.

    Returns:
        Nats per step, one list per probe.
    """
    scores: dict[Probe, list[float]] = {}
    for rows in batches(probes, max_tokens):
        for row, logps in zip(rows, _forward_packed(model, rows), strict=True):
            scores[row] = _gains(row, _packed_scores(row, logps))
    return [list(scores.get(row, ())) for row in probes]


def batches(probes: Sequence[Probe], max_tokens: int) -> list[list[Probe]]:
    """The probes that share a forward: equal ones once, longest first, none padded to more than twice its length.

    Responses without steps need no forward. Attention over a row costs its padded length squared.
    """
    distinct = sorted({row: None for row in probes if row.gains}, key=lambda row: -row.tokens)
    found: list[list[Probe]] = []
    for row in distinct:
        longest = found[-1][0].tokens if found else 0
        if found and longest * (len(found[-1]) + 1) <= max_tokens and longest <= 2 * row.tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


@torch.no_grad()
def score_naive(model: Any, probes: Sequence[Probe]) -> list[list[float]]:
    """The same as ``score_packed`` with one plain forward per score: slow, for any attention.

    Args:
        model: any causal LM, in evaluation mode.
        probes: from ``probe``.
    """

    def score(context: Sequence[int], scored: int) -> float:
        if not scored:
            return 0.0
        ids = torch.tensor([context], device=_device(model))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return float(logps[-scored:].double().sum())

    found = []
    for row in probes:
        scores = [score(row.ids[:stop], stop - start) for start, stop in row.spans]
        scores += [score((*row.ids[: branch.visible], *branch.ids), branch.scored) for branch in row.branches]
        found.append(_gains(row, scores))
    return found


def takes_masks(model: Any) -> bool:
    """Whether packed scoring is exact: attention that adds a 4-D mask, and no sliding window lost."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    slides = any(kind != "full_attention" for kind in kinds)
    slides = slides or (not kinds and getattr(config, "sliding_window", None) is not None)
    return config._attn_implementation in ("sdpa", "eager") and not slides


def weight(importance: float, temperature: float) -> float:
    """A step's weight in [0, 1): ``1 - exp(-max(I, 0) / temperature)``. Our choice.

    Args:
        importance: nats; negative ones (a step that misleads) weigh nothing.
        temperature: nats at which the weight reaches 63 %.
    """
    return float(-torch.expm1(torch.tensor(-max(importance, 0.0) / temperature, dtype=torch.float64)))


def _gains(row: Probe, scores: Sequence[float]) -> list[float]:
    return [scores[with_it] - scores[without] for with_it, without in row.gains]


def _forward_packed(model: Any, rows: Sequence[Probe]) -> Iterator[torch.Tensor]:
    """Log-probability of every packed token given its own branch's past, one vector a row."""
    device, dtype = _device(model), model.dtype
    length = max(row.tokens for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    sees = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
    sees[:, 0].diagonal(dim1=-2, dim2=-1).fill_(True)  # padding sees itself: a row of nothing gives NaN
    for index, row in enumerate(rows):
        _pack(row, ids[index], positions[index], sees[index, 0])
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
    logits = model(
        input_ids=ids.to(device), position_ids=positions.to(device), attention_mask=mask.to(device), use_cache=False
    ).logits
    for index, row in enumerate(rows):
        previous = torch.tensor(_predecessors(row), device=logits.device)
        chosen = logits[index].index_select(0, previous)
        target = ids[index, 1 : row.tokens].to(logits.device)
        yield torch.cat([chosen.new_zeros(1), _token_logps(chosen, target)]).double().cpu()


def _token_logps(logits: torch.Tensor, target: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """Log-softmax at the targets, a chunk at a time: the float32 copy of all logits would be the largest tensor."""
    parts = [
        part.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        for part, wanted in zip(logits.split(chunk), target.split(chunk), strict=True)
    ]
    return torch.cat(parts) if parts else logits.new_zeros(0)


def _pack(row: Probe, ids: torch.Tensor, positions: torch.Tensor, sees: torch.Tensor) -> None:
    """Write the response and its branches into one row."""
    own = len(row.ids)
    ids[:own] = torch.tensor(row.ids)
    positions[:own] = torch.arange(own)
    sees[:own, :own] = torch.ones(own, own, dtype=torch.bool).tril()
    at = own
    for branch in row.branches:
        end = at + len(branch.ids)
        ids[at:end] = torch.tensor(branch.ids, dtype=torch.long)
        positions[at:end] = torch.arange(branch.visible, branch.visible + end - at)
        sees[at:end, : branch.visible] = True
        sees[at:end, at:end] = torch.ones(end - at, end - at, dtype=torch.bool).tril()
        at = end


def _predecessors(row: Probe) -> list[int]:
    """Index of the packed token that predicts each packed token but the first."""
    found, at = list(range(len(row.ids) - 1)), len(row.ids)
    for branch in row.branches:
        if branch.ids:
            found += [branch.visible - 1, *range(at, at + len(branch.ids) - 1)]
        at += len(branch.ids)
    return found


def _packed_scores(row: Probe, logps: torch.Tensor) -> list[float]:
    scores = [float(logps[start:stop].sum()) for start, stop in row.spans]
    at = len(row.ids)
    for branch in row.branches:
        at += len(branch.ids)
        scores.append(float(logps[at - branch.scored : at].sum()))
    return scores


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
