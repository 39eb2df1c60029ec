"""Rejection sampling keeps the right rows and survives a kill; SFT rows are exact and never cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thinkkv.patches.errors import ThinkKVError
from thinkkv.recipes.metrics import MetricsLog, TokenRate
from thinkkv.recipes.smartthinker.sampling import Sample, read_samples, sample_in_batches, select
from thinkkv.recipes.smartthinker.sft import tokenise_samples, tokenise_traces
from thinkkv.recipes.tasks.running_value import END_THINK, tokenizer


def sample(index: int, *ids: int, score: float = 1.0, prompt: str | None = None) -> Sample:
    return Sample(index, prompt or f"p{index}", ids, "text", score)


def test_the_shortest_right_one_of_each_prompt_is_kept() -> None:
    samples = [sample(0, 1, 2, 3), sample(0, 4, 5), sample(0, 9, score=0.0), sample(1, 7), sample(2, 8, score=0.5)]
    assert select(samples, keep="shortest", per_prompt=1, seed=0) == [sample(0, 4, 5), sample(1, 7)]


def test_duplicates_are_kept_once() -> None:
    samples = [sample(0, 1), sample(0, 1), sample(0, 1, 2), sample(1, 1, prompt="p0")]
    assert select(samples, keep="shortest", per_prompt=3, seed=0) == [sample(0, 1), sample(0, 1, 2)]


def test_a_random_choice_hangs_on_the_seed_alone() -> None:
    samples = [sample(0, at) for at in range(20)]
    first = select(samples, keep="random", per_prompt=2, seed=4)
    assert first == select(samples, keep="random", per_prompt=2, seed=4)
    assert any(select(samples, keep="random", per_prompt=2, seed=seed) != first for seed in range(5))


def test_a_killed_sampling_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    rows = [(at, {"prompt": f"p{at}"}) for at in range(5)]
    path, drawn = tmp_path / "samples.jsonl", []

    def draw(chunk: Any, seed: int) -> list[Sample]:
        drawn.append(seed)
        return [sample(at, at, n) for at, _ in chunk for n in range(2)]

    def run(told: list[tuple[int, bool]]) -> list[Sample]:
        def done(number: int, _: list[Sample], seconds: float | None) -> None:
            told.append((number, seconds is not None))

        return sample_in_batches(path, rows, samples=2, prompts_per_batch=2, draw=draw, done=done)

    whole = run([])
    assert (drawn, len(whole)) == ([0, 2, 4], 10)
    # A kill in the middle of the second batch's write.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])
    told: list[tuple[int, bool]] = []
    assert sorted(run(told), key=lambda item: item.ids) == sorted(whole, key=lambda item: item.ids)
    assert drawn == [0, 2, 4, 2, 4]
    assert told == [(1, False), (2, True), (3, True)]
    assert len(read_samples(path)) == 10


def test_rows_are_the_sampled_ids_and_over_long_ones_are_counted() -> None:
    words = tokenizer()
    prompt = words(" 3 ; a +1 ; ?<think>").input_ids
    samples = [sample(0, 8, 9, 1, prompt=" 3 ; a +1 ; ?<think>"), sample(1, *[8] * 40, prompt=" 3 ; a +1 ; ?<think>")]
    found = tokenise_samples(samples, words, limit=20)
    assert found.too_long == 1
    assert found.rows == [{"input_ids": [*prompt, 8, 9, 1], "completion_mask": [0] * len(prompt) + [1] * 3}]


def test_traces_get_their_end_token_once() -> None:
    words = tokenizer()
    rows = [{"prompt": " 3 ; ?", "completion": f"{END_THINK} 3{end}"} for end in ("", "<eos>")]
    found = tokenise_traces(rows, words, limit=None)
    assert found.rows[0] == found.rows[1]
    assert found.rows[0]["input_ids"][-1] == words.eos_token_id


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(ThinkKVError, match="1 of 1 are longer than max_length 2"):
        tokenise_samples([sample(0, 8, 9, 1, prompt=" 3")], tokenizer(), limit=2)


def test_metrics_are_rewound_to_a_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for stage, step in ((0, 1), (0, 2), (1, 1), (1, 2), (1, 3)):
        log.append(stage, "sft", step, {"loss": 1.5, "bad": float("nan")})
    with log.path.open("a") as file:
        file.write('{"stage": 1, "step": 4, "lo')
    log.rewind(1, 2)
    assert [(row["stage"], row["step"]) for row in log.rows()] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(json.loads(line)["bad"] is None for line in log.path.read_text().splitlines())
    log.rewind(1, -1)
    assert [(row["stage"], row["step"]) for row in log.rows()] == [(0, 1), (0, 2)]


def test_tokens_per_second_by_hand() -> None:
    times = iter([10.0, 12.0, 16.0])
    rate = TokenRate(lambda: next(times))
    assert [rate(total) for total in (100, 300, None, 500)] == [None, 100.0, None, 50.0]
