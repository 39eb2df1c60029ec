"""Rewards by name, and problems from every kind of source."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from thinkkv.patches.errors import RecipeError, ThinkKVError
from thinkkv.recipes.config import DataConfig, RewardConfig
from thinkkv.recipes.problems import load_problems
from thinkkv.recipes.rewards import answer_part, build_reward, call
from thinkkv.recipes.smartthinker.steps import StepRules
from thinkkv.recipes.tasks import gym_traces
from thinkkv.recipes.tasks import running_value as task

RULES = StepRules()


def score(name: str, text: str, answer: str, prompt: str = "?") -> float:
    reward = build_reward(RewardConfig(name), RULES)
    return call(reward, [{"prompt": prompt, "answer": answer}], [text], [[1]])[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("<think>a</think> 7 ", "7"), ("a</think>7", "7"), ("just 7", "just 7"), ("<think>a", None)],
)
def test_the_answer_stands_behind_the_reasoning(text: str, answer: str | None) -> None:
    assert answer_part(text, RULES) == answer


def test_exact() -> None:
    assert score("exact", "a</think> 7", "7", prompt="q<think>") == 1.0
    assert score("exact", "a</think> 8", "7", prompt="q<think>") == 0.0
    assert score("exact", "7", "7", prompt="q<think>") == 0.0  # the template opened the reasoning; nothing closed it


def test_format() -> None:
    assert score("format", "<think>a</think> 7", "7") == 1.0
    assert score("format", "<think>a</think>", "7") == 0.0
    assert score("format", "a</think> 7", "7", prompt="q<think>") == 1.0


def test_math_verify_sees_equal_values() -> None:
    assert score("math_verify", "<think>a</think> It is $\\boxed{\\frac{1}{2}}$.", "0.5") == 1.0
    assert score("math_verify", "<think>a</think> $\\boxed{2}$", "\\frac{1}{2}") == 0.0


def length_reward(completions, **_):
    """A reward of a user's own."""
    return [float(len(text)) for text in completions]


def test_a_dotted_path() -> None:
    assert score(f"{__name__}.length_reward", "abc", "7") == 3.0


@pytest.mark.parametrize("name", ["exakt", "no.such.module", f"{__name__}.nothing"])
def test_an_unknown_reward(name: str) -> None:
    with pytest.raises(RecipeError, match=r"choose|dotted path"):
        build_reward(RewardConfig(name), RULES)


class TestTask:
    def test_traces_without_slips_are_right_and_of_known_kinds(self) -> None:
        rng = random.Random(3)
        for _ in range(100):
            problem = task.draw(rng)
            text = task.trace(problem, rng, task.Style(compression=0.3, easy_slip=0.0, hard_slip=0.0))
            assert task.answer_of(text) == problem.answer
            kinds = task.mean_kinds([text])
            assert kinds["detail"] + kinds["compressed"] == len(problem.operations)

    def test_by_hand(self) -> None:
        problem = task.Problem(3, ("+1", "*2", "-1"), hard=True)
        assert problem.values == [3, 4, 3, 2]
        assert problem.prompt == " 3 ; a +1 ; b *2 ; c -1 ; ?<think>"
        text = task.trace(problem, random.Random(0), task.Style(redundancy=0, compression=0))
        assert text == " a : 3 +1 = 4\n\n b : 4 *2 = 3\n\n c : 3 -1 = 2\n\n</think> 2<eos>"

    def test_the_tokenizer_loses_nothing(self) -> None:
        words = task.tokenizer()
        for row in task.rows(50, 1, task.Style()):
            for text in (row["prompt"], row["completion"]):
                assert words.decode(words(text).input_ids) == text
                assert words.pad_token_id not in words(text).input_ids

    def test_longer_chains(self) -> None:
        config = DataConfig(
            "task:running-value", rows=60, eval_rows=20, options={"easy": [4, 6], "hard": [8, 12], "redundancy": 0}
        )
        lengths, _ = task.options(config.options)
        words = task.tokenizer(lengths)
        found = load_problems(config, None, 0)
        for row in found.train + found.held_out:
            counts = range(8, 13) if row["level"] == "hard" else range(4, 7)
            assert row["prompt"].count(" ; ") - 1 in counts
        for row in found.train:
            assert words.decode(words(row["completion"]).input_ids) == row["completion"]
            assert task.mean_kinds([row["completion"]])["redundant"] == 0
        assert all(words.pad_token_id not in words(row["prompt"]).input_ids for row in found.held_out)

    @pytest.mark.parametrize("given", [{"easy": [0, 2]}, {"hard": [5, 4]}, {"hard": [4, 27]}, {"easy": 3}, {"hart": 1}])
    def test_options_that_make_no_task(self, given: dict[str, Any]) -> None:
        with pytest.raises(RecipeError, match=r"data\.options: "):
            load_problems(DataConfig("task:running-value", rows=4, options=given), None, 0)

    def test_held_out_problems_are_the_same_for_every_seed(self) -> None:
        config = DataConfig("task:running-value", rows=50, eval_rows=4)
        first, second = (load_problems(config, None, seed) for seed in (0, 1))
        assert first.held_out == second.held_out
        assert first.train != second.train

    def test_held_out_problems_are_not_trained_on(self) -> None:
        found = load_problems(DataConfig("task:running-value", rows=500, eval_rows=100), None, 0)
        assert not {row["prompt"] for row in found.train} & {row["prompt"] for row in found.held_out}
        assert len(found.train) > 250


class TestSources:
    def test_jsonl_with_mapped_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"question": f"q{n}", "solution": str(n)}) + "\n" for n in range(5)))
        config = DataConfig(
            str(path), columns={"prompt": "question", "answer": "solution"}, eval_rows=2, template="Q: {prompt}"
        )
        found = load_problems(config, object(), 0)
        assert [row["prompt"] for row in found.held_out] == ["Q: q0", "Q: q1"]
        assert [row["answer"] for row in found.train] == ["2", "3", "4"]

    def test_parquet(self, tmp_path: Path) -> None:
        from datasets import Dataset

        path = tmp_path / "data.parquet"
        Dataset.from_list([{"prompt": f"p{n}", "answer": "1"} for n in range(3)]).to_parquet(str(path))
        assert len(load_problems(DataConfig(str(path), eval_rows=1), object(), 0).train) == 2

    def test_declared_columns_are_checked_before_the_data_is_fetched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import datasets

        features = "- {name: problem, dtype: string}\n  - {name: answer, dtype: string}"
        (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features:\n  {features}\n---\n")
        (tmp_path / "train.jsonl").write_text('{"problem": "p", "answer": "1"}\n' * 3)
        mapped = DataConfig(str(tmp_path), columns={"prompt": "problem"}, eval_rows=1)
        assert len(load_problems(mapped, object(), 0).held_out) == 1
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("fetched"))
        with pytest.raises(RecipeError, match=r"no column question but problem, answer - map it"):
            load_problems(DataConfig(str(tmp_path), columns={"prompt": "question"}), object(), 0)

    def test_mistakes(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text('{"prompt": "p"}\n')
        with pytest.raises(RecipeError, match="row 1: no column answer but prompt"):
            load_problems(DataConfig(str(path), eval_rows=0), object(), 0)
        path.write_text("[1]\n")
        with pytest.raises(ThinkKVError, match="line 1 is no JSON object"):
            load_problems(DataConfig(str(path)), object(), 0)
        with pytest.raises(ThinkKVError, match=r"check data.source"):
            load_problems(DataConfig(str(tmp_path / "none.jsonl")), object(), 0)
        with pytest.raises(RecipeError, match="no task"):
            load_problems(DataConfig("task:chess"), object(), 0)
        with pytest.raises(RecipeError, match=r"set data.rows"):
            load_problems(DataConfig("task:running-value"), object(), 0)


class TestGymTraces:
    def test_chain_sum_by_hand(self) -> None:
        entry = {"metadata": {"expression": "15 - 43 + 7"}}
        quiet = random.Random()
        quiet.random = lambda: 0.9  # type: ignore[method-assign]
        assert gym_traces.chain_sum(entry, quiet) == "<think>\n15 - 43 = -28.\n\n-28 + 7 = -21.\n</think>\n-21"

    def test_traces_are_right_by_the_gym_s_own_verifier(self) -> None:
        pytest.importorskip("reasoning_gym")
        found = load_problems(DataConfig("gym:chain_sum", rows=10, eval_rows=2), object(), 3)
        reward = build_reward(RewardConfig("gym"), RULES)
        texts = [row["completion"] for row in found.train]
        assert call(reward, found.train, texts, [[1]] * 10) == [1.0] * 10
        assert max(call(reward, found.train, ["<think>a</think> x"] * 10, [[1]] * 10)) < 0.5
        assert load_problems(DataConfig("gym:chain_sum", rows=10, eval_rows=2), object(), 3) == found
