"""The hooks into TRL, against values computed by hand; a TRL that moved them fails here."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes.fixed_rollouts import OLD_LOGP, RESPONSES, SIZE, given_rewards, new_trainer, score
from tests.recipes.lenient_reward import some_right
from thinkkv.patches.errors import ThinkKVError
from thinkkv.recipes.smartthinker.clipping import ClipRange
from thinkkv.recipes.smartthinker.reward import StepReward
from thinkkv.recipes.smartthinker.rollouts import patched_rollouts
from thinkkv.recipes.smartthinker.scpo import SCPO
from thinkkv.recipes.tasks.running_value import tokenizer

ROWS = len(RESPONSES)
ROOT = Path(__file__).parents[2]


def outcome(rewards: list[float]) -> list[float]:
    """GRPO's advantage of one group."""
    tensor = torch.tensor(rewards)
    return ((tensor - tensor.mean()) / (tensor.std() + 1e-4)).tolist()


@pytest.fixture
def scored(tmp_path: Path) -> Any:
    def run(**settings: Any) -> Any:
        trainer = new_trainer(tmp_path, ROWS, SCPO(**settings))
        return trainer, score(trainer, ROWS)

    return run


def test_with_no_strength_the_advantages_are_grpo_s_own(scored) -> None:
    _, found = scored(strength=0.0)
    expected = [value for begin in range(0, ROWS, SIZE) for value in outcome([r for _, r in RESPONSES[begin:][:SIZE]])]
    for row, wanted, mask in zip(found["advantages"], expected, found["completion_mask"], strict=True):
        assert row[mask.bool()].tolist() == pytest.approx([wanted] * int(mask.sum()), abs=1e-5)
        assert (row[~mask.bool()] == 0).all()


def test_the_step_stream_by_hand(scored) -> None:
    # The first prompt's right responses have steps of 7 | 7 6 | 5 7 5 tokens; uniform weights 1/2; k2 = 0, lambda = 0.
    _, found = scored(strength=1.0, importance="uniform", lam=0.0, reward=StepReward(k1=0.8, k2=0.0), floor=0.1)
    lengths = [7, 7, 6, 5, 7, 5]
    mean = sum(lengths) / 6
    std = math.sqrt(sum((n - mean) ** 2 for n in lengths) / 6)
    reward = {n: 1 - 0.5 * 0.8 / (1 + math.exp(-(n - mean) / std)) for n in (5, 6, 7)}
    base = (reward[7] + (reward[7] + reward[6]) / 2 + (2 * reward[5] + reward[7]) / 3) / 3
    scale = float(torch.tensor([reward[n] for n in lengths], dtype=torch.float64).std()) + 0.1
    own = outcome([1.0, 1.0, 0.0, 1.0])
    step = {n: (reward[n] - base) / scale for n in reward}
    rows = found["advantages"]
    assert rows[0][:10].tolist() == pytest.approx([own[0] + step[7]] * 7 + [own[0]] * 3, abs=1e-5)
    assert rows[1][:16].tolist() == pytest.approx(
        [own[1] + step[7]] * 7 + [own[1] + step[6]] * 6 + [own[1]] * 3, abs=1e-5
    )
    third = [own[3] + step[5]] * 5 + [own[3] + step[7]] * 7 + [own[3] + step[5]] * 5 + [own[3]] * 3
    assert rows[3][:20].tolist() == pytest.approx(third, abs=1e-5)


def test_the_clipped_loss_by_hand(scored) -> None:
    trainer, found = scored(clip=ClipRange(0.2, 0.5))
    loss = trainer._compute_loss(trainer.model, found).detach()
    # Pass rates 3/4, 2/4 and 2/4: upper bounds .2 + .3 * (4 - c) / 3 for right responses.
    right = [reward > 0 for _, reward in RESPONSES]
    high = [0.2 + 0.3 * (4 - sum(right[at // SIZE * SIZE :][:SIZE])) / 3 if ok else 0.2 for at, ok in enumerate(right)]
    assert found["clip_high"].tolist() == pytest.approx(high)
    words, total, count = tokenizer(), 0.0, 0
    for row, (text, _) in enumerate(RESPONSES):
        prompt = found["prompt_ids"][row][found["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, torch.tensor(words(text).input_ids)])
        with torch.no_grad():
            logps = trainer.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        for at, logp in enumerate(logps[len(prompt) - 1 :].tolist()):
            ratio, advantage = math.exp(logp - OLD_LOGP), float(found["advantages"][row, at])
            clipped = min(max(ratio, 0.8), 1 + high[row])
            total -= min(ratio * advantage, clipped * advantage)
            count += 1
    assert float(loss) == pytest.approx(total / count, rel=1e-4)
    assert trainer.epsilon_low == 0.2  # as the trainer's own arguments say


def test_switching_s_gae_off_gives_a_response_one_value(scored) -> None:
    _, found = scored(step_level=False)
    for row, mask in zip(found["advantages"], found["completion_mask"], strict=True):
        assert len(set(row[mask.bool()].tolist())) == 1


def test_a_response_that_nothing_judges_moves_nothing(tmp_path: Path) -> None:
    def undecided(prompts: Any, completion_ids: Any, **_: Any) -> list[float | None]:
        return [None, *given_rewards(prompts, completion_ids)[1:]]

    found = score(new_trainer(tmp_path, ROWS, SCPO(), rewards=undecided), ROWS)
    assert (found["advantages"][0] == 0).all()
    assert torch.isfinite(found["advantages"]).all()
    assert found["advantages"][1].abs().max() > 0


@pytest.mark.parametrize(("policy", "ratio", "same"), [("task-kv", 1.0, True), ("streaming-llm", 0.75, False)])
def test_a_patched_sampler_brings_its_own_log_probabilities(
    tmp_path: Path, policy: str, ratio: float, same: bool
) -> None:
    trainer = new_trainer(tmp_path, ROWS, SCPO(), rollouts=patched_rollouts(policy, ratio), rewards=some_right)
    found = score(trainer, ROWS)
    model = trainer.model.eval()
    own = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([found["prompt_ids"], found["completion_ids"]], 1),
        torch.cat([found["prompt_mask"], found["completion_mask"]], 1),
        found["completion_ids"].shape[1],
    )[0]
    mask = found["completion_mask"].bool()
    difference = (found["old_per_token_logps"] - own.detach())[mask].abs().max()
    assert difference < 1e-4 if same else difference > 1e-2


@pytest.mark.parametrize("importance", ["next-steps", "answer-removal", "prefix-gain", "random", "uniform"])
def test_every_importance_gives_finite_advantages_and_a_metric(scored, importance: str) -> None:
    trainer, found = scored(importance=importance)
    assert torch.isfinite(found["advantages"]).all()
    assert trainer._metrics["train"]["scpo/critical_share"]
    assert trainer._metrics["train"]["accuracy"] == [sum(reward for _, reward in RESPONSES) / ROWS]


def test_settings_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ThinkKVError, match="no true importance"):
        new_trainer(tmp_path, ROWS, SCPO(importance="oracle"))


def test_two_processes_compute_what_one_does(tmp_path: Path, scored) -> None:
    # Six rows a process and four responses a prompt: the second prompt straddles both.
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    script = "from tests.recipes.fixed_rollouts import main; main()"
    program = tmp_path / "two.py"
    program.write_text(script)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*run, str(program), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    _, found = scored()
    for row, mask, got in zip(
        found["advantages"], found["completion_mask"], ranks[0]["advantages"] + ranks[1]["advantages"], strict=True
    ):
        assert got == pytest.approx(row[mask.bool()].tolist(), abs=1e-5)
    assert ranks[0]["clip_high"] + ranks[1]["clip_high"] == pytest.approx(found["clip_high"].tolist())
