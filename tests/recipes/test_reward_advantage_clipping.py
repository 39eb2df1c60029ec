"""Step reward, S-GAE and clipping against hand-computed values; defined and finite in every degenerate group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.recipes.smartthinker.advantage import baseline, broadcast, s_gae, step_advantages
from thinkkv.recipes.smartthinker.clipping import ClipRange, upper_bounds
from thinkkv.recipes.smartthinker.reward import Rollout, Spread, StepReward, global_penalty, sigmoid, step_rewards

FULL = StepReward(k1=1.0, k2=1.0, rho=1.0)


def rollout(*lengths: int, right: bool = True, weight: float = 0.0) -> Rollout:
    return Rollout(lengths, right, (weight,) * len(lengths))


class TestReward:
    def test_right_responses_by_hand(self) -> None:
        # Lengths 2, 4, 6: mean 4, std sqrt(8/3). Step counts 2, 1: mean 1.5, std .5, z = 1 and -1.
        found = step_rewards([rollout(2, 4), rollout(6)], FULL)
        z = 2 / math.sqrt(8 / 3)
        up, down = sigmoid(1), sigmoid(-1)
        expected = [[(1 - sigmoid(-z)) * (1 - up), 0.5 * (1 - up)], [(1 - sigmoid(z)) * (1 - down)]]
        for got, wanted in zip(found, expected, strict=True):
            assert got == pytest.approx(wanted)

    def test_wrong_responses_by_hand(self) -> None:
        found = step_rewards([rollout(5, 1, 9, right=False)], StepReward(rho=2.0))
        assert found[0] == pytest.approx([-math.exp(-4 / 3), -math.exp(-2 / 3), -1.0])

    def test_wrong_responses_do_not_move_the_normalisers(self) -> None:
        alone = step_rewards([rollout(2, 4), rollout(6)], FULL)
        assert step_rewards([rollout(2, 4), rollout(6), rollout(900, right=False)], FULL)[:2] == alone

    def test_importance_spares_a_step(self) -> None:
        mixed = Rollout((8, 8), True, (1.0, 0.0))
        critical, redundant = step_rewards([mixed, rollout(2)], FULL)[0]
        assert critical == 1.0
        assert redundant < 0.5

    def test_equal_lengths_and_counts_are_neutral(self) -> None:
        found = step_rewards([rollout(3, 3), rollout(3, 3)], StepReward(k1=0.8, k2=0.4))
        assert found == [[pytest.approx((1 - 0.4) * (1 - 0.2))] * 2] * 2

    def test_global_penalty_by_hand(self) -> None:
        found = global_penalty([10, 30, 5], [True, True, False], 0.4)
        assert found == pytest.approx([1 - 0.4 * sigmoid(-1), 1 - 0.4 * sigmoid(1), 0.0])

    def test_weights_must_match_the_steps(self) -> None:
        with pytest.raises(ValueError, match="2 steps but 1 weights"):
            Rollout((1, 2), True, (0.5,))

    def test_spread_is_the_population_one(self) -> None:
        spread = Spread.of([1, 2, 6])
        assert (spread.mean, spread.std) == (3, pytest.approx(float(torch.tensor([1.0, 2, 6]).std(correction=0))))


class TestAdvantage:
    def test_two_steps_by_hand(self) -> None:
        # b = (mean(1, .5) + .25) / 2 = .5
        group = [[1.0, 0.5], [0.25]]
        assert baseline(group) == 0.5
        assert step_advantages(group[0], 0.5, gamma=0.9, lam=0.5) == pytest.approx([0.5 + 0.45 * 0.0, 0.0])
        assert step_advantages([0.5, 1.0], 0.5, gamma=0.9, lam=0.5) == pytest.approx([0.225, 0.5])
        deviation = float(torch.tensor([1.0, 0.5, 0.25]).std())
        found = s_gae([group], gamma=0.9, lam=0.5, floor=0.1)[0]
        assert found[0] == pytest.approx([0.5 / (deviation + 0.1), 0.0])
        assert found[1] == pytest.approx([-0.25 / (deviation + 0.1)])

    @given(st.lists(st.floats(-1, 1), min_size=2, max_size=16), st.sampled_from([1e-4, 0.1]))
    def test_one_step_and_lambda_one_is_group_relative(self, rewards: list[float], floor: float) -> None:
        found = [row[0] for row in s_gae([[[value] for value in rewards]], lam=1.0, gamma=1.0, floor=floor)[0]]
        tensor = torch.tensor(rewards, dtype=torch.float64)
        assert found == pytest.approx(((tensor - tensor.mean()) / (tensor.std() + floor)).tolist(), abs=1e-9)

    def test_batch_whitening_shares_one_scale(self) -> None:
        groups = [[[1.0], [0.0]], [[0.2], [0.1]]]
        scale = float(torch.tensor([1.0, 0.0, 0.2, 0.1]).std()) + 0.1
        found = s_gae(groups, whitening="batch")
        assert found[1][0] == pytest.approx([0.05 / scale])
        assert s_gae(groups, whitening="none")[0][0] == pytest.approx([0.5])

    def test_broadcast_leaves_other_tokens_alone(self) -> None:
        assert broadcast([2.0, -1.0], [(1, 3), (3, 4)], 6) == [0, 2.0, 2.0, -1.0, 0, 0]


class TestClipping:
    def test_by_hand(self) -> None:
        clip = ClipRange(0.2, 0.28)
        assert upper_bounds([True, False, False, False], clip) == pytest.approx([0.28, 0.2, 0.2, 0.2])
        assert upper_bounds([True] * 4, clip) == pytest.approx([0.2] * 4)
        assert upper_bounds([True, True, False], clip) == pytest.approx([0.24, 0.24, 0.2])

    @given(st.lists(st.booleans(), max_size=12))
    def test_always_within_the_range(self, right: list[bool]) -> None:
        assert all(0.2 <= bound <= 0.28 + 1e-12 for bound in upper_bounds(right, ClipRange(0.2, 0.28)))


@given(
    st.lists(
        st.lists(
            st.tuples(st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 1)), max_size=5), st.booleans()), max_size=4
        ),
        max_size=3,
    ),
    st.sampled_from(["group", "batch", "none"]),
    st.sampled_from([0.0, 0.1]),
)
def test_nothing_is_ever_nan(groups, whitening, floor) -> None:
    rewards = []
    for group in groups:
        rollouts = [Rollout(tuple(n for n, _ in steps), ok, tuple(w for _, w in steps)) for steps, ok in group]
        rewards.append(step_rewards(rollouts, FULL))
        for row, item in zip(rewards[-1], rollouts, strict=True):
            assert all(0 <= value <= 1 if item.right else -1 <= value < 0 for value in row)
    for group, found in zip(rewards, s_gae(rewards, whitening=whitening, floor=floor), strict=True):
        assert [len(row) for row in found] == [len(row) for row in group]
        assert all(math.isfinite(value) for row in found for value in row)


@pytest.mark.parametrize("bad", [{"k1": 1.5}, {"k2": -0.1}, {"rho": -1.0}])
def test_impossible_strengths_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        StepReward(**bad)
