"""Calibration against the stock model's own attention and values, in explicit float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import LAYERS, QUERY_HEADS, WINDOW, new_model, prompts, stock_attention
from thinkkv import sdk
from thinkkv.sdk.hidden_facts import builtin_prompts
from thinkkv.sdk.policies import TaskKV

KV_HEADS = 4
GROUP = QUERY_HEADS // KV_HEADS
TEXTS = ["How many apples are left? " * 6, "A short one.", "Where did the old man go, and why? " * 3]


@pytest.fixture(scope="module")
def model() -> Any:
    return new_model("llama", KV_HEADS)


@pytest.fixture(scope="module")
def distance_profile(model: Any, char_tokenizer: Any) -> sdk.HeadProfile:
    return sdk.calibrate(model, char_tokenizer, TEXTS)


@pytest.fixture(scope="module")
def retrieval_profile(model: Any, char_tokenizer: Any) -> sdk.HeadProfile:
    return sdk.calibrate(model, char_tokenizer, score="retrieval")


def distances(attention: torch.Tensor, values: torch.Tensor, *, window: int = 32, top: int = 256) -> list[float]:
    """Eq. 12-15 by loops, and the largest distance of each query group."""
    vectors = []
    for head in range(len(attention)):
        columns = attention[head, -window:].mean(dim=0)
        chosen = sorted(range(len(columns)), key=lambda token, columns=columns: -float(columns[token]))[:top]
        vectors.append(sum(columns[token] * values[head // GROUP, token] for token in chosen))
    center = sum(vectors) / len(vectors)
    each = [float((vector - center).square().sum().sqrt()) for vector in vectors]
    return [max(each[head * GROUP : (head + 1) * GROUP]) for head in range(KV_HEADS)]


class TestDistance:
    """The score of Task-KV, averaged over prompts."""

    def test_scores_equal_a_recomputation_from_the_stock_model(
        self, model: Any, char_tokenizer: Any, distance_profile: sdk.HeadProfile
    ) -> None:
        tokenised = [char_tokenizer(text).input_ids for text in TEXTS]
        per_prompt = [[distances(*layer) for layer in stock_attention(model, ids)] for ids in tokenised]
        expected = torch.tensor(per_prompt).mean(dim=0)
        torch.testing.assert_close(torch.tensor(distance_profile.scores), expected, rtol=1e-3, atol=1e-4)

    def test_classes_are_the_policys_choice_by_these_scores(self, distance_profile: sdk.HeadProfile) -> None:
        # n = 4 with query groups: f(r) = 1.2 .. 1, one head everywhere, the farthest.
        expected = [(max(range(KV_HEADS), key=row.__getitem__),) for row in distance_profile.scores]
        assert list(distance_profile.heterogeneous) == expected

    def test_heads_without_groups_include_the_nearest(self, char_tokenizer: Any) -> None:
        profile = sdk.calibrate(new_model("llama", QUERY_HEADS), char_tokenizer, TEXTS)
        counts = [TaskKV().heterogeneous_count(QUERY_HEADS, QUERY_HEADS, layer, LAYERS) for layer in range(LAYERS)]
        assert counts == [2, 2, 1]
        for row, classes, count in zip(profile.scores, profile.heterogeneous, counts, strict=True):
            farthest, nearest = max(range(8), key=row.__getitem__), min(range(8), key=row.__getitem__)
            assert set(classes) == ({farthest, nearest} if count == 2 else {farthest})

    def test_the_profile_tells_what_it_was_made_of(self, distance_profile: sdk.HeadProfile) -> None:
        assert (distance_profile.score, distance_profile.policy) == ("distance", "task-kv")
        assert distance_profile.calibration["prompts"] == 3
        assert len(distance_profile.calibration["sha256"]) == 64

    def test_a_sliding_window_limits_what_is_scored(self, char_tokenizer: Any) -> None:
        model = new_model("mistral-window", KV_HEADS)
        ids = char_tokenizer(TEXTS[0]).input_ids
        found = sdk.calibrate(model, char_tokenizer, TEXTS[:1]).scores
        (attention, values), *_ = stock_attention(model, ids)
        # What the next token still sees; among these the last queries attend as if nothing came before.
        seen = attention[:, -(WINDOW - 1) :, -(WINDOW - 1) :]
        expected = distances(seen / seen.sum(dim=-1, keepdim=True), values[:, -(WINDOW - 1) :])
        assert list(found[0]) == pytest.approx(expected, rel=1e-3)


class TestRetrieval:
    """Classes by the order of elimination."""

    def test_the_best_fifth_of_all_heads_is_marked(self, retrieval_profile: sdk.HeadProfile) -> None:
        scores = torch.tensor(retrieval_profile.scores)
        ranked = scores.flatten().argsort(descending=True).tolist()
        best = {divmod(place, KV_HEADS) for place in ranked[: round(0.2 * LAYERS * KV_HEADS)]}
        marked = {(layer, head) for layer, row in enumerate(retrieval_profile.heterogeneous) for head in row}
        assert marked == best

    def test_it_makes_its_own_prompts(
        self, model: Any, char_tokenizer: Any, retrieval_profile: sdk.HeadProfile
    ) -> None:
        other = sdk.calibrate(model, char_tokenizer, ["anything"], score="retrieval")
        assert other == retrieval_profile


class TestRuns:
    """What every calibration promises."""

    @pytest.mark.parametrize("score", ["distance", "retrieval"])
    def test_it_is_deterministic(
        self, model: Any, char_tokenizer: Any, score: str, request: pytest.FixtureRequest
    ) -> None:
        torch.manual_seed(99)
        again = sdk.calibrate(model, char_tokenizer, TEXTS, score=score)
        assert again == request.getfixturevalue(f"{score}_profile")

    @pytest.mark.parametrize("score", ["distance", "retrieval"])
    def test_it_leaves_the_model_as_it_was(self, char_tokenizer: Any, score: str) -> None:
        model = new_model("qwen3", KV_HEADS).train()
        before, implementation = set(model.__dict__), model.config._attn_implementation
        sdk.calibrate(model, char_tokenizer, TEXTS[:1], score=score)
        assert model.training
        assert set(model.__dict__) == before
        assert model.config._attn_implementation == implementation

    def test_a_profile_fixes_the_classes_of_every_prompt(
        self, model: Any, distance_profile: sdk.HeadProfile, tmp_path: Path
    ) -> None:
        folder = distance_profile.save(tmp_path)
        small = TaskKV(sinks=2, recent=8, observation_window=4)
        free, fixed = [], []
        for label in "abcdef":
            ids = prompts([90], label=label).ids
            for found, profile in ((free, None), (fixed, folder)):
                with sdk.apply(model, policy=small, ratio=0.75, profile=profile) as handle:
                    model.generate(ids, max_new_tokens=2, do_sample=False)
                    found.append([layer.heterogeneous for layer in handle.report().layers])
        assert fixed == [list(distance_profile.heterogeneous)] * 6
        assert any(classes != free[0] for classes in free)

    def test_retrieval_profile_runs_its_policy(self, model: Any, retrieval_profile: sdk.HeadProfile) -> None:
        ids = prompts([600]).ids
        with sdk.apply(model, profile=retrieval_profile, ratio=0.7) as handle:
            model.generate(ids, max_new_tokens=2, do_sample=False)
            found = handle.report()
        assert found.policy == "retrieval-kv"
        assert [layer.heterogeneous for layer in found.layers] == list(retrieval_profile.heterogeneous)

    def test_progress_sees_every_prompt(self, model: Any, char_tokenizer: Any) -> None:
        steps: list[Any] = []

        def noting(runs: Any) -> Any:
            for run in runs:
                steps.append(run)
                yield run

        sdk.calibrate(model, char_tokenizer, TEXTS, progress=noting)
        assert len(steps) == 3

    def test_empty_texts_are_skipped_and_refused_when_alone(self, model: Any, char_tokenizer: Any) -> None:
        with pytest.raises(sdk.ProfileMismatchError, match="no prompt to calibrate on"):
            sdk.calibrate(model, char_tokenizer, ["", ""])
        with pytest.raises(sdk.ProfileMismatchError, match="no prompt to calibrate on"):
            sdk.calibrate(model, char_tokenizer, [])
        skipped = sdk.calibrate(model, char_tokenizer, ["", TEXTS[0]])
        assert skipped.scores == sdk.calibrate(model, char_tokenizer, TEXTS[:1]).scores
        assert skipped.calibration["prompts"] == 1

    def test_an_unknown_score_is_told_the_known_ones(self, model: Any, char_tokenizer: Any) -> None:
        with pytest.raises(sdk.ProfileMismatchError, match="'entropy' - choose one of distance, retrieval"):
            sdk.calibrate(model, char_tokenizer, TEXTS, score="entropy")

    def test_a_patched_model_is_refused(self, model: Any, char_tokenizer: Any) -> None:
        with sdk.apply(model), pytest.raises(sdk.PatchStateError):
            sdk.calibrate(model, char_tokenizer, TEXTS)

    def test_the_built_in_prompts_are_several_and_long(self) -> None:
        texts = builtin_prompts()
        assert len(set(texts)) == len(texts) >= 4
        assert min(len(text) for text in texts) > 500
