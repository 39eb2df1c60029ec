"""Matched-KV: its ranking, and values that are the least squares of float64 on the stock model's queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.sdk.planning import Model
from tests.tiny_models import VARIANTS, new_model, prompts, stock_queries, tiny_model
from thinkkv import sdk
from thinkkv.sdk import reference_queries, rehearsal
from thinkkv.sdk.budget import LayerBudget
from thinkkv.sdk.evaluation.prefill import prefill
from thinkkv.sdk.evaluation.setting import parse_policy
from thinkkv.sdk.matched_values import matched_values
from thinkkv.sdk.policies import MatchedKV, RereadKV
from thinkkv.sdk.reference_queries import ReferenceQueries

RANKS = ((0.1, 0.4), (0.9, 0.2), (0.6, 0.8))
SMALL = MatchedKV(head_scores=RANKS, share=0.2, sinks=2, recent=3, whole=26)
NO_SUMMARIES = replace(SMALL, summaries=0)


def least_squares(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    kept: list[int],
    recent: int,
    scale: float,
    ridge: float,
) -> np.ndarray:
    """[S, D] float64: the same by numpy, of the queries' equations and the tokens' own values below one another."""
    q, k, v = (one.double().numpy() for one in (queries, keys, values))
    weights = np.exp(q @ k.T * scale)
    wanted = weights @ v / weights.sum(axis=1, keepdims=True)
    mine = weights[:, kept] / weights[:, kept].sum(axis=1, keepdims=True)
    free = max(0, len(kept) - recent)
    left = np.concatenate([mine[:, :free], ridge**0.5 * np.eye(free)])
    right = np.concatenate([wanted - mine[:, free:] @ v[kept[free:]], ridge**0.5 * v[kept[:free]]])
    return np.concatenate([np.linalg.lstsq(left, right, rcond=None)[0], v[kept[free:]]])


class TestValues:
    @given(data=st.data())
    def test_they_are_the_least_squares(self, data: st.DataObject) -> None:
        tokens, count, dim = (data.draw(st.integers(1, most)) for most in (30, 40, 8))
        kept = sorted(data.draw(st.sets(st.integers(0, tokens - 1), min_size=1)))
        ridge, recent = data.draw(st.floats(1e-2, 10)), data.draw(st.integers(0, 9))
        torch.manual_seed(data.draw(st.integers(0, 10_000)))
        queries, keys, values = 2 * torch.randn(count, dim), torch.randn(tokens, dim), torch.randn(tokens, dim)
        reference = ReferenceQueries.of(queries, keys, values, 0.5)
        found = matched_values(reference, (keys[kept], values[kept]), recent=recent, ridge=ridge)
        expected = least_squares(queries, keys, values, kept, recent, 0.5, ridge)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4)

    def test_many_queries_are_taken_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        queries, keys, values = torch.randn(50, 4), torch.randn(30, 4), torch.randn(30, 4)

        def matched() -> torch.Tensor:
            reference = ReferenceQueries.of(queries, keys, values, 0.5)
            return matched_values(reference, (keys[::3], values[::3]), recent=2, ridge=0.1)

        whole = matched()
        monkeypatch.setattr(reference_queries, "ROWS", 7)
        torch.testing.assert_close(matched(), whole, rtol=1e-4, atol=1e-5)

    def test_what_no_query_looks_at_stays_as_it_is(self) -> None:
        keys, values = torch.tensor([[1.0, 0], [0.9, 0], [-1, 0]]), torch.randn(3, 2)
        queries, kept = torch.tensor([[60.0, 0]] * 5), [0, 2]
        reference = ReferenceQueries.of(queries, keys, values, 1.0)
        found = matched_values(reference, (keys[kept], values[kept]), recent=0, ridge=0.01)
        assert torch.equal(found[1], values[2])
        assert not torch.allclose(found[0], values[0])

    def test_a_strong_ridge_leaves_all_as_they_are(self) -> None:
        torch.manual_seed(0)
        queries, keys, values, kept = torch.randn(20, 4), torch.randn(9, 4), torch.randn(9, 4), [1, 5]
        reference = ReferenceQueries.of(queries, keys, values, 1.0)
        found = matched_values(reference, (keys[kept], values[kept]), recent=0, ridge=1e8)
        torch.testing.assert_close(found, values[kept], rtol=1e-5, atol=1e-5)


class TestQueries:
    @pytest.mark.parametrize("kv_heads", [8, 2, 1])
    @pytest.mark.parametrize("variant", sorted(VARIANTS))
    def test_they_are_those_of_the_stock_model(
        self, variant: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rehearsal, "CHUNK", 20)
        monkeypatch.setattr(rehearsal, "LEAD_IN", 4)
        model, ids = tiny_model(variant, kv_heads, torch.float32), prompts([63], label=variant).ids[0].tolist()
        asked = [torch.empty(kv_heads, 0, 16)] * len(model.model.layers)
        for start in range(0, 63, 20):
            again = max(0, start - 4)
            read = ids + ids[again : start + 20]
            for layer, queries in enumerate(stock_queries(model, read)):
                counted = queries[:, 63 + start - again :].unflatten(0, (kv_heads, -1)).flatten(1, 2)
                asked[layer] = torch.cat([asked[layer], counted], dim=1)
        for prompt, expected in zip(held(model, [ids]), asked, strict=True):
            for mine, theirs in zip(prompt.reread[0], expected, strict=True):
                # In an order of their own; the same token at the same place of two parts asks the same.
                assert mine.shape == theirs.shape
                apart = (mine[:, None] - theirs).abs().amax(dim=2)
                assert max(apart.amin(dim=0).max(), apart.amin(dim=1).max()) < 1e-3

    def test_a_padded_row_has_those_that_it_would_have_alone(self) -> None:
        model = tiny_model("qwen3-mixed", 2, torch.float32)
        rows = [prompts([length]).ids[0].tolist() for length in (63, 41, 7)]
        together = held(model, rows, queries=50)
        for i, row in enumerate(rows):
            for found, alone in zip(together, held(model, [row], queries=50), strict=True):
                torch.testing.assert_close(found.reread[i], alone.reread[0], rtol=1e-4, atol=1e-5)
                assert found.reread[i].shape[1] == min(50, 4 * len(row))

    def test_of_long_prompts_some_are_drawn_in_every_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rehearsal, "CHUNK", 20)
        ids = prompts([63]).ids[0].tolist()
        found = held(tiny_model("llama", 2, torch.float32), [ids], queries=21)
        everything = held(tiny_model("llama", 2, torch.float32), [ids])
        for some, whole in zip(found, everything, strict=True):
            assert some.reread[0].shape[1] in range(21, 25)  # rounded up in each of four parts
            drawn = [(whole.reread[0][0] == row).all(dim=1).nonzero()[0].item() for row in some.reread[0][0]]
            assert len(set(drawn)) == len(drawn)
            assert {int(place) // 80 for place in drawn} == {0, 1, 2, 3}

    @pytest.mark.parametrize("kv_heads", [8, 2, 1])
    @pytest.mark.parametrize("variant", sorted(VARIANTS))
    def test_those_of_shuffled_tokens_are_the_stock_models(
        self, variant: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(rehearsal, "SHUFFLED", 19)
        model, ids = tiny_model(variant, kv_heads, torch.float32), prompts([63], label=variant).ids[0].tolist()
        found = held(model, [ids])
        for prompt, queries in zip(found, stock_queries(model, ids + shuffled(ids, 19)), strict=True):
            expected = queries[:, 63:].unflatten(0, (kv_heads, -1)).flatten(1, 2)
            torch.testing.assert_close(prompt.shuffled[0], expected, rtol=1e-3, atol=1e-3)

    def test_shuffled_tokens_of_a_row_are_the_same_however_it_is_padded(self) -> None:
        model = tiny_model("qwen3-mixed", 2, torch.float32)
        rows = [prompts([length]).ids[0].tolist() for length in (63, 41, 1)]
        together = held(model, rows)
        for i, row in enumerate(rows):
            for found, alone in zip(together, held(model, [row]), strict=True):
                torch.testing.assert_close(found.shuffled[i], alone.shuffled[0], rtol=1e-4, atol=1e-5)

    def test_attention_of_shuffled_tokens_is_not_counted(self) -> None:
        model, ids = tiny_model("llama", 2, torch.float32), prompts([63]).ids[0].tolist()
        for found, without in zip(held(model, [ids]), held(model, [ids], summaries=0), strict=True):
            assert without.shuffled == ()
            assert torch.equal(found.rehearsed, without.rehearsed)
            assert torch.equal(found.rehearsed_sum, without.rehearsed_sum)
            assert torch.equal(found.reread[0], without.reread[0])

    def test_without_a_policy_that_asks_none_are_held(self) -> None:
        model, ids = tiny_model("llama", 2, torch.float32), prompts([63]).ids[0].tolist()
        with sdk.apply(model, policy=RereadKV(head_scores=RANKS, sinks=2, recent=3, whole=26), ratio=0.5) as handle:
            found = prefill(model, [ids], [handle.compression]).layers
        assert all(prompt.reread == prompt.shuffled == () for prompt in found)


class TestPolicy:
    def test_the_cache_holds_matched_values_but_in_full_heads(self) -> None:
        model, ids = tiny_model("llama", 2, torch.float32), prompts([90]).ids
        with torch.inference_mode(), sdk.apply(model, policy=NO_SUMMARIES, ratio=0.4) as handle:
            model(ids, past_key_values=(cache := handle.new_cache()))
        full = 0
        for prompt, kept, stored in zip(
            held(model, [ids[0].tolist()]), cache.kept_positions(), cache.kept_entries(), strict=True
        ):
            for head, (positions, (keys, values)) in enumerate(zip(kept[0], stored[0], strict=True)):
                own = prompt.keys[0, head], prompt.values[0, head]
                expected = least_squares(prompt.reread[0][head], *own, positions, 3, prompt.scale, SMALL.ridge)
                assert torch.equal(keys, own[0][positions])
                if len(positions) == 90:
                    full += 1
                    assert torch.equal(values, own[1])
                else:
                    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-2, atol=1e-3)
                    assert not np.allclose(own[1][positions].numpy(), expected, atol=1e-2)
                    assert torch.equal(values[-3:], own[1][-3:])
        assert full == 1

    def test_evicted_tokens_leave_summaries_in_the_same_bytes(self) -> None:
        model, ids = tiny_model("llama", 2, torch.float32), prompts([90]).ids
        caches = []
        for policy in (SMALL, NO_SUMMARIES):
            with torch.inference_mode(), sdk.apply(model, policy=policy, ratio=0.4) as handle:
                model(ids, past_key_values=(cache := handle.new_cache()))
                caches.append((cache, handle.report(cache).bytes.used))
        assert caches[0][1] == caches[1][1]
        summarised = 0
        for prompt, kept, stored in zip(
            held(model, [ids[0].tolist()]), caches[0][0].kept_positions(), caches[0][0].kept_entries(), strict=True
        ):
            for head, (positions, (keys, _)) in enumerate(zip(kept[0], stored[0], strict=True)):
                others = (keys != prompt.keys[0, head, positions]).any(dim=1)
                assert others.sum() == (0 if len(positions) == 90 else 4)
                assert not others[:2].any()
                assert not others[-3:].any()
                summarised += int(others.sum())
        assert summarised == 5 * 4

    def test_summaries_are_fitted_to_shuffled_tokens_and_values_to_the_reading(self) -> None:
        view = Model(kv_heads=2, group=2, windows=(None,), tokens=100, seed=1).view(0)
        policy = MatchedKV(head_scores=RANKS[:1], share=0, sinks=2, recent=3, whole=26)
        assert view.reread is not None
        assert view.shuffled is not None

        def planned(**other: torch.Tensor) -> Any:
            (plan,) = policy.plan_model([replace(view, **other)], [LayerBudget(90)])
            return zip(plan.kept, plan.entries, strict=True)

        for (kept, mine), (_, of_reading), (_, of_shuffled), own in zip(
            planned(),
            planned(reread=view.reread.flip(1) + 1),
            planned(shuffled=view.shuffled + 1),
            view.keys,
            strict=True,
        ):
            summaries = (mine[0] != own[kept]).any(dim=1)
            assert summaries.sum() == 4
            assert torch.equal(of_reading[0], mine[0])
            assert not torch.allclose(of_reading[1][:-3], mine[1][:-3])
            assert torch.equal((of_shuffled[0] != mine[0]).any(dim=1), summaries)

    @given(seed=st.integers(0, 1000), sizes=st.tuples(st.sampled_from([0.1, 1, 10]), st.sampled_from([0.1, 1, 10])))
    def test_a_layer_with_small_outputs_keeps_more(self, seed: int, sizes: tuple[float, float]) -> None:
        made_up = Model(kv_heads=2, group=2, windows=(None, None), tokens=100, seed=seed)
        views = [made_up.view(layer) for layer in range(2)]
        views = [replace(view, values=size * view.values) for view, size in zip(views, sizes, strict=True)]
        policy = MatchedKV(head_scores=RANKS[:2], share=0, sinks=2, recent=3, whole=26, summaries=0)
        found = policy.plan_model(views, [LayerBudget(60), LayerBudget(60)])
        ranked = []
        for view in views:
            assert view.reread is not None
            assert view.rehearsed is not None
            assert view.rehearsed_sum is not None
            weights = torch.softmax(view.reread.double() @ view.keys.double().mT * view.scale, dim=-1)
            size = (weights @ view.values.double()).square().mean().sqrt()
            ranked.append((view.rehearsed.double() * view.rehearsed_sum.double()).sqrt() / size)
        scores = torch.stack(ranked)
        scores[..., :2] = scores[..., -3:] = torch.inf
        best = scores.flatten().sort(descending=True).values
        assume(best[119] > (1 + 1e-5) * best[120])  # else float32 may tell them apart otherwise
        for plan, layer in zip(found, scores >= best[119], strict=True):
            assert [kept.tolist() for kept in plan.kept] == [head.nonzero()[:, 0].tolist() for head in layer]

    @pytest.mark.parametrize("variant", ["llama", "qwen3-mixed"])
    def test_what_the_reading_gets_from_the_cache_is_nearer_to_what_it_got_from_all(self, variant: str) -> None:
        """The property that it is for, in the model: its beginning again, as what follows."""
        model, ids = tiny_model(variant, 2, torch.float32), prompts([90] * 8).ids
        with torch.inference_mode():
            wanted = model(torch.cat([ids, ids[:, :60]], dim=1)).logits[:, 90:]
            errors = []
            for policy in (RereadKV(head_scores=RANKS, share=0.2, sinks=2, recent=3, whole=26), NO_SUMMARIES, SMALL):
                with sdk.apply(model, policy=policy, ratio=0.4):
                    cache = model(ids).past_key_values
                    errors.append((model(ids[:, :60], past_key_values=cache).logits - wanted).norm())
        assert errors[1] < 0.9 * errors[0]
        assert errors[2] < 0.9 * errors[0]

    @pytest.mark.parametrize(("ranked", "summaries"), [(0, 0), (3, 0), (4, 1), (11, 2), (16, 4), (40, 4)])
    def test_of_ranked_tokens_a_quarter_may_be_summaries_at_most(self, ranked: int, summaries: int) -> None:
        view = Model(kv_heads=2, group=2, windows=(None,), tokens=100, seed=1).view(0)
        policy = MatchedKV(head_scores=RANKS[:1], share=0, sinks=2, recent=3, whole=26)
        (plan,) = policy.plan_model([view], [LayerBudget(2 * (5 + ranked))])
        assert plan.tokens == 2 * (5 + ranked)
        for own, kept, entries in zip(view.keys, plan.kept, plan.entries, strict=True):
            assert entries is not None
            assert (entries[0] != own[kept]).any(dim=1).sum() == summaries

    @pytest.mark.parametrize("options", ["ridge=0", "ridge=-1", "ridge=nan", "queries=0"])
    def test_what_cannot_be_matched_is_refused(self, options: str) -> None:
        with pytest.raises(sdk.BudgetError, match=r"matched-kv has nothing to match .* - choose numbers above 0"):
            parse_policy(f"matched-kv+{options}")

    def test_fewer_than_no_summaries_are_refused(self) -> None:
        with pytest.raises(sdk.BudgetError, match="cannot keep summaries=-1 - choose 0 or more"):
            parse_policy("matched-kv+summaries=-1")

    def test_nothing_of_the_reading_is_left(self) -> None:
        model, ids = new_model("llama", 2), prompts([90]).ids
        with torch.inference_mode(), sdk.apply(model, policy=SMALL, ratio=0.4) as handle:
            model(ids, past_key_values=(cache := handle.new_cache()))
            found = handle.report(cache).bytes
        assert all(layer.held is None for layer in cache.layers)
        assert found.used == found.planned <= found.promised


def held(model: Any, rows: list[list[int]], queries: int = 10**6, summaries: int = 4) -> list[Any]:
    """What each layer holds of prompts that were read twice."""
    policy = MatchedKV(head_scores=RANKS, queries=queries, summaries=summaries, sinks=2, recent=3, whole=0)
    with sdk.apply(model, policy=policy, ratio=0.5) as handle:
        return list(prefill(model, rows, [handle.compression]).layers)


def shuffled(ids: list[int], count: int) -> list[int]:
    """So many of the tokens, in the order in which they are read."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [ids[int(part * len(ids))] for part in drawn.tolist()]
