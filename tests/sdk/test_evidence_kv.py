"""Evidence-KV: full heads by the profile, the rest by one ranking over all layers, held against the stock attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import new_model, prompts
from thinkkv import sdk
from thinkkv.sdk.budget import Budget, LayerPrompt
from thinkkv.sdk.policies import EvidenceKV
from thinkkv.sdk.policies.ranked_tokens import keep_best
from thinkkv.sdk.whole_prompt import WholePrompt

RANKS = ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8), (0.9, 1.0, 0.0, 0.2))
SINKS, RECENT, WINDOW = 2, 6, 4


def policy(**options: Any) -> EvidenceKV:
    small = {"sinks": SINKS, "recent": RECENT, "observation_window": WINDOW, "pooling": 3}
    return EvidenceKV(head_scores=RANKS, **small | options)


def stock_evidence(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[layers, n, N] float64: the window's attention by the stock model, averaged over queries, group, neighbours."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    weights = torch.stack(attentions)[:, 0].double()[:, :, -WINDOW:].mean(dim=2)
    by_head = weights.unflatten(1, (4, -1)).mean(dim=2)
    padded = torch.nn.functional.pad(by_head, (1, 1))
    return (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3


def expected_places(scores: torch.Tensor, full: set[tuple[int, int]], each: int, floor: float) -> set[tuple[int, ...]]:
    """(layer, head, position) of all that is kept, by loops."""
    layers, heads, tokens = scores.shape
    kept = {(*head, position) for head in full for position in range(tokens)}
    rest: list[tuple[float, tuple[int, ...]]] = []
    others = [(layer, head) for layer in range(layers) for head in range(heads) if (layer, head) not in full]
    middle = each - SINKS - RECENT
    for layer, head in others:
        ends = [*range(SINKS), *range(tokens - RECENT, tokens)]
        row = scores[layer, head].tolist()
        order = sorted(range(SINKS, tokens - RECENT), key=row.__getitem__, reverse=True)
        certain = int(floor * middle)
        kept |= {(layer, head, position) for position in [*ends, *order[:certain]]}
        rest += [(row[at], (layer, head, at)) for at in order[certain:]]
    shared = len(others) * (middle - int(floor * middle))
    return kept | {place for _, place in sorted(rest, reverse=True)[:shared]}


@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
def test_what_is_kept_is_what_the_stock_models_attention_ranks_first(floor: float) -> None:
    model, ids = new_model("llama", 4), prompts([100]).ids
    with torch.inference_mode(), sdk.apply(model, policy=policy(floor=floor, share=0.2), ratio=0.4) as handle:
        model(ids, past_key_values=(cache := handle.new_cache()))
        report = handle.report(cache)
    full = {(2, 0), (2, 1)}  # the best two of twelve
    each = (3 * int(0.4 * 100 * 4) - len(full) * 100) // 10
    kept = {
        (layer, head, position)
        for layer, rows in enumerate(cache.kept_positions())
        for head, positions in enumerate(rows[0])
        for position in positions
    }
    assert kept == expected_places(stock_evidence(model, ids), full, each, floor)
    assert [layer.heterogeneous for layer in report.layers] == [(), (), (0, 1)]
    assert report.bytes.used <= report.bytes.promised
    lengths = {len(positions) for rows in cache.kept_positions() for positions in rows[0]}
    assert (lengths == {each, 100}) == (floor == 1)


def test_prompts_and_their_queries_are_held_no_longer_than_needed() -> None:
    model = new_model("llama", 4)
    held = []
    with torch.inference_mode(), sdk.apply(model, policy=policy(), ratio=0.4) as handle:
        cache = handle.new_cache()
        last = model.model.layers[-1].register_forward_hook(
            lambda *_: held.extend(layer.held for layer in cache.layers if layer.held is not None)
        )
        model(prompts([100]).ids, past_key_values=cache)
        last.remove()
    assert [prompt.query.shape[2] for prompt in held] == [WINDOW] * 3
    assert not cache.held


@given(data=st.data())
def test_last_queries_are_each_sequences_own(data: st.DataObject) -> None:
    batch, tokens, count = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12)), data.draw(st.integers(0, 12))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    query, keys = torch.randn(batch, 4, tokens, 2), torch.randn(batch, 2, tokens, 2)
    real = None if data.draw(st.booleans()) else torch.rand(batch, tokens) < 0.7
    whole = WholePrompt(query, keys, keys, 1.0, real)
    held = whole.with_last_queries(count)
    for sequence, length in enumerate(whole.lengths):
        own = query[sequence] if real is None else query[sequence][:, real[sequence]]
        newest = held.view(sequence, 0, 1, length).queries
        wanted = min(count, length)
        assert torch.equal(newest[:, newest.shape[1] - wanted :], own[:, length - wanted :])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4),
    tokens=st.integers(0, 150),
    seed=st.integers(0, 1000),
)
def test_keep_best_equals_sorting(sizes: list[tuple[int, int]], tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(size, generator=generator) for size in sizes]
    certain = [torch.rand(size, generator=generator) < 0.3 for size in sizes]
    found = keep_best(certain, scores, tokens)
    places = [
        (bool(mask), float(score), (layer, index))
        for layer, (masks, values) in enumerate(zip(certain, scores, strict=True))
        for index, (mask, score) in enumerate(zip(masks.flatten(), values.flatten(), strict=True))
    ]
    order = sorted(places, reverse=True)
    wanted = {place for _, _, place in order[: max(tokens, sum(mask for mask, _, _ in places))]}
    kept = {(layer, int(index)) for layer, mask in enumerate(found) for index in mask.flatten().nonzero()[:, 0]}
    assert kept == wanted


def test_it_asks_for_a_profile() -> None:
    with pytest.raises(sdk.ProfileMismatchError, match="evidence-kv chooses its heads by a profile"):
        EvidenceKV().layer_budgets([LayerPrompt(0, 2, 1000)], Budget(ratio=0.5))
