"""Reading a prompt again: held against the stock model's own attention, and what becomes of it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import VARIANTS, new_model, prompts, stock_attention, tiny_model
from thinkkv import sdk
from thinkkv.patches.errors import BudgetError, UnsupportedGenerationError
from thinkkv.sdk import rehearsal
from thinkkv.sdk.cache import HeterogeneousCache
from thinkkv.sdk.evaluation.prefill import prefill
from thinkkv.sdk.policies import KVzip, RehearsedKV, SnapKV
from thinkkv.sdk.rehearsal import attend_again
from thinkkv.sdk.whole_prompt import WholePrompt

SMALL = KVzip(sinks=2, recent=3, whole=26)
CHUNK, LEAD_IN = 20, 4
SCALE = 0.3
"""No power of two: a factor of the logits that must not be rounded with the states."""
OUTPUTS = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-8, "atol": 2**-6}}
"""How near attention is; what is noted of it is as near in bfloat16 as in float32."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "CHUNK", CHUNK)
    monkeypatch.setattr(rehearsal, "LEAD_IN", LEAD_IN)
    monkeypatch.setattr(rehearsal, "QUERIES", 7)


def rehearsed(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Per layer the most and all attention of a batch, [2, B, n, N]."""
    with sdk.apply(model, policy=SMALL, ratio=0.5) as handle:
        found = prefill(model, rows, [handle.compression]).layers
    return [torch.stack([prompt.rehearsed, prompt.rehearsed_sum]) for prompt in found]  # type: ignore[list-item]


def stock_rehearsal(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """The same of one prompt by the stock model in float64: the text, then a part of it once more, for every part."""
    heads = model.config.num_key_value_heads
    noted = [torch.zeros(2, heads, len(ids), dtype=torch.float64) for _ in model.model.layers]
    for start in range(0, len(ids), CHUNK):
        again = max(0, start - LEAD_IN)
        part = ids[again : start + CHUNK]
        for layer, (attention, _) in enumerate(stock_attention(model, ids + part)):
            own = attention[:, len(ids) + start - again :, : len(ids)].unflatten(0, (heads, -1))
            most, total = noted[layer]
            noted[layer] = torch.stack([torch.maximum(most, own.amax(dim=(1, 2))), total + own.sum(dim=(1, 2))])
    return noted


class TestScores:
    @pytest.mark.parametrize("kv_heads", [8, 2, 1])
    @pytest.mark.parametrize("variant", sorted(VARIANTS))
    def test_they_are_the_most_and_all_attention_that_the_stock_model_pays(self, variant: str, kv_heads: int) -> None:
        model, ids = tiny_model(variant, kv_heads, torch.float32), prompts([63], label=variant).ids[0].tolist()
        for found, expected in zip(rehearsed(model, [ids]), stock_rehearsal(model, ids), strict=True):
            torch.testing.assert_close(found[:, 0].double(), expected, rtol=1e-4, atol=1e-6)

    def test_a_padded_row_is_scored_as_if_it_were_alone(self) -> None:
        model = tiny_model("qwen3-mixed", 2, torch.float32)
        rows = [prompts([length]).ids[0].tolist() for length in (63, 41, 7)]
        together = rehearsed(model, rows)
        for i, row in enumerate(rows):
            for found, alone in zip(together, rehearsed(model, [row]), strict=True):
                torch.testing.assert_close(found[:, i, :, -len(row) :], alone[:, 0], rtol=1e-4, atol=1e-6)
                assert not found[:, i, :, : -len(row)].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @given(data=st.data())
    def test_attention_equals_masked_attention_in_float64(self, dtype: torch.dtype, data: st.DataObject) -> None:
        heads, group, old, new = (data.draw(st.integers(1, most)) for most in (3, 6, 40, 20))
        size = data.draw(st.sampled_from([4, 40]))
        window, counted_from = data.draw(st.none() | st.integers(1, 25)), data.draw(st.integers(0, new))
        torch.manual_seed(data.draw(st.integers(0, 10_000)))
        query = (3 * torch.randn(2, heads * group, new, size)).to(dtype)
        keys, values = torch.randn(2, 2, heads, old + new, size).to(dtype)
        real_old, real_new = (torch.rand(2, length) < 0.8 for length in (old, new))
        held = WholePrompt(query, keys[:, :, :old], values[:, :, :old], SCALE, real_old)
        out, most, total = attend_again(
            held, query, keys[:, :, old:], values[:, :, old:], real_new, window, counted_from
        )
        real = torch.cat([real_old, real_new], dim=1)
        position = real.cumsum(dim=1)
        expected, expected_sum = torch.zeros_like(most), torch.zeros_like(total)
        for b in range(2):
            age = position[b, old:, None] - position[b]
            seen = (age >= 0) & (age < (window or 1000)) & real[b] & real_new[b, :, None]
            counted = real_new[b] & (real_new[b].cumsum(dim=0) > counted_from)
            for head in range(heads * group):
                logits = query[b, head].double() @ keys[b, head // group].double().T * SCALE
                weights = logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
                attended = weights @ values[b, head // group].double()
                torch.testing.assert_close(out[b, head].double(), attended, **OUTPUTS[dtype])
                own = (weights * counted[:, None])[:, :old].float()
                expected[b, head // group] = torch.maximum(expected[b, head // group], own.amax(dim=0))
                expected_sum[b, head // group] += own.sum(dim=0)
        torch.testing.assert_close(most, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(total, expected_sum, rtol=1e-4, atol=1e-5)


class TestCompression:
    def test_the_best_tokens_of_all_layers_are_kept(self) -> None:
        model, ids = tiny_model("llama", 4, torch.float32), prompts([90]).ids
        scores = torch.stack(rehearsed(model, [ids[0].tolist()]))[:, 0, 0]
        scores[..., :2] = scores[..., -3:] = 2
        with sdk.apply(model, policy=SMALL, ratio=0.25) as handle:
            cache = handle.new_cache()
            with torch.inference_mode():
                model(ids, past_key_values=cache)
        budget = int(0.25 * 90 * 4) * 3
        wanted = {tuple(place) for place in (scores >= scores.flatten().sort().values[-budget]).nonzero().tolist()}
        kept = {
            (layer, head, position)
            for layer, rows in enumerate(cache.kept_positions())
            for head, positions in enumerate(rows[0])
            for position in positions
        }
        assert kept == wanted
        assert len({len(positions) for rows in cache.kept_positions() for positions in rows[0]}) > 2

    def test_rehearsed_kv_keeps_the_best_of_each_head_as_many_as_its_rank_earns(self) -> None:
        model, ids = tiny_model("llama", 4, torch.float32), prompts([90]).ids
        ranks = ((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8), (0.9, 1.0, 0.0, 0.2))
        policy = RehearsedKV(head_scores=ranks, by_rank=1, power=2, pooling=3, sinks=2, recent=3, whole=26)
        with sdk.apply(model, policy=policy, ratio=0.4) as handle, torch.inference_mode():
            model(ids, past_key_values=(cache := handle.new_cache()))
            report = handle.report(cache)
            values = [
                layer.values[0].double() for layer in prefill(model, [ids[0].tolist()], [handle.compression]).layers
            ]
            earned = [share.per_head for share in handle.compression.allocate(90)]
        for layer, ((most, _), value) in enumerate(zip(stock_rehearsal(model, ids[0].tolist()), values, strict=True)):
            for head, kept in enumerate(cache.kept_positions()[layer][0]):
                padded = torch.nn.functional.pad(most[head] * value[head].norm(dim=-1), (1, 1))
                means = (padded[:-2] + padded[1:-1] + padded[2:])[2:-3]
                best = (means.argsort(descending=True)[: earned[layer][head] - 5] + 2).tolist()
                assert {0, 1, *best, 87, 88, 89} <= set(kept)
        lengths = {rank: earned[i][j] for i, r in enumerate(ranks) for j, rank in enumerate(r)}
        assert [lengths[rank] for rank in sorted(lengths)] == sorted(lengths.values())
        assert lengths[0.0] == 5
        assert lengths[1.0] == 90
        kept = [[len(positions) for positions in rows[0]] for rows in cache.kept_positions()]
        assert report.layers[2].heterogeneous == tuple(head for head in range(4) if kept[2][head] == 90)
        assert sum(map(sum, kept)) == 3 * int(0.4 * 90 * 4)
        assert report.bytes.used <= report.bytes.promised

    def test_first_logits_are_those_of_the_whole_prompt(self) -> None:
        model, ids = tiny_model("llama", 4, torch.float32), prompts([90]).ids
        with torch.inference_mode():
            expected = model(ids).logits
            with sdk.apply(model, policy=SMALL, ratio=0.25):
                found = model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_embeddings_are_read_again_as_tokens_are(self) -> None:
        model, ids = tiny_model("llama", 4, torch.float32), prompts([90]).ids
        with torch.inference_mode(), sdk.apply(model, policy=SMALL, ratio=0.25) as handle:
            by_ids, by_embeddings = handle.new_cache(), handle.new_cache()
            model(ids, past_key_values=by_ids)
            model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=by_embeddings)
        assert by_ids.kept_positions() == by_embeddings.kept_positions()

    def test_a_sequence_without_a_token_beside_a_long_one(self) -> None:
        model, batch = tiny_model("llama", 4, torch.float32), prompts([90, 90])
        mask = batch.mask.clone()
        mask[1] = 0
        with torch.inference_mode(), sdk.apply(model, policy=SMALL, ratio=0.25) as handle:
            model(batch.ids, attention_mask=mask, past_key_values=(cache := handle.new_cache()))
        assert all(not any(rows[1]) and all(rows[0]) for rows in cache.kept_positions())

    @pytest.mark.parametrize(("tokens", "ratio"), [(26, 0.3), (60, 1.0)])
    def test_a_prompt_that_is_kept_whole_is_not_read_again(self, tokens: int, ratio: float) -> None:
        model = new_model("llama", 4)
        with torch.inference_mode(), sdk.apply(model, policy=SMALL, ratio=ratio) as handle:
            calls: list[int] = []
            model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
            model(prompts([tokens]).ids, past_key_values=(cache := handle.new_cache()))
        assert calls == [1]
        assert cache.kept_positions()[0][0] == [list(range(tokens))] * 4

    def test_nothing_but_the_store_is_left(self) -> None:
        model, ids = tiny_model("llama", 4, torch.float32), prompts([90]).ids
        with torch.inference_mode(), sdk.apply(model, policy=SMALL, ratio=0.25) as handle:
            model(ids, past_key_values=(cache := handle.new_cache()))
            found = handle.report(cache).bytes
        assert not cache.held
        assert all(layer.held is None for layer in cache.layers)
        assert found.used <= found.promised < found.full / 3

    def test_too_small_a_budget_is_refused_before_a_second_layer_runs(self) -> None:
        model = new_model("llama", 4)
        calls: list[int] = []
        model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        refused = pytest.raises(BudgetError, match="kvzip needs at least 5")
        with torch.inference_mode(), sdk.apply(model, policy=SMALL, ratio=0.05), refused:
            model(prompts([63]).ids)
        assert calls == []


class TestPatch:
    def test_a_prompt_that_was_never_compressed_is_refused(self) -> None:
        model, ids = tiny_model("llama", 4, torch.float32), prompts([90]).ids
        with sdk.apply(model, policy=SMALL, ratio=0.25) as handle:
            cache = HeterogeneousCache(handle.compression)
        with torch.inference_mode(), sdk.apply(model, policy=SnapKV(observation_window=4), ratio=0.25):
            model(ids, past_key_values=cache)
            with pytest.raises(UnsupportedGenerationError, match="was not compressed - start a new cache"):
                model(ids[:, :1], past_key_values=cache)

    def test_layers_called_without_their_decoder_are_told_so(self) -> None:
        view = WholePrompt(*torch.zeros(3, 1, 2, 90, 4), scale=1.0).view(0, 0, 1, 90)
        with pytest.raises(UnsupportedGenerationError, match="read twice"):
            SMALL.plan(view, sdk.policies.policy.LayerBudget(50))

    def test_reverting_takes_the_second_reading_away(self) -> None:
        model = new_model("llama", 4)
        hooks = dict(model.model._forward_hooks)
        sdk.apply(model, policy=SMALL, ratio=0.25).revert()
        assert dict(model.model._forward_hooks) == hooks
