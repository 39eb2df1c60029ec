"""A recipe is read strictly: every mistake is one line that names the place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thinkkv.patches.errors import RecipeError
from thinkkv.recipes import config

GOOD = """\
model:
  name: smollm2-135m
data:
  source: data.jsonl
reward: exact
stages:
  - kind: rejection_sampling
  - kind: sft
    args:
      learning_rate: 1e-4
  - kind: scpo
    strength: 1
    clip:
      high: 0.3
"""
PACKAGED = sorted(path.name for path in (Path(config.__file__).parent).glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path):
    def load(text: str = GOOD, *overrides: str) -> config.Recipe:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return config.load(path, overrides)

    return load


def test_values_and_defaults(recipe) -> None:
    found = recipe()
    assert found.name == "my"
    assert [stage.kind for stage in found.stages] == ["rejection_sampling", "sft", "scpo"]
    assert found.stages[1].args == {"learning_rate": 1e-4}  # a number, not the text that YAML 1.1 makes of it
    assert (found.stages[2].strength, found.stages[2].clip.low, found.stages[2].clip.high) == (1.0, 0.2, 0.3)
    assert found.reward == (config.RewardConfig("exact"),)
    assert found.resume == "auto"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data:\n", "dat:\n", r"my.yaml, line 3: unknown key dat - did you mean data\?"),
        ("  source:", "  sourec:", r"line 4: unknown key data.sourec - did you mean source\?"),
        ("strength: 1", "strenght: 1", r"line 12: unknown key stages.2.strenght - did you mean strength\?"),
        ("high: 0.3", "hihg: 0.3", r"line 14: unknown key stages.2.clip.hihg - did you mean high\?"),
        ("strength: 1", "strength: much", r"line 12: stages.2.strength is 'much' - write a number"),
        ("strength: 1", "step_level: 1", r"line 12: stages.2.step_level is 1 - write true or false"),
        ("strength: 1", "importance: magic", r"line 12: .*'magic' - choose one of next-steps, answer-removal"),
        ("kind: sft", "kind: stf", r"line 8: stages.1.kind is 'stf' - choose one of sft"),
        ("reward: exact\n", "", r"reward is missing - name one"),
        ("  name: smollm2-135m", "  dtype: float32", r"line 1: model: give either name or scratch"),
        ("  source: data.jsonl", "  split: train", r"line 3: data.source is missing - add it"),
        ("reward: exact", "reward: exact\nreward: format", r"key reward is given twice"),
        ("reward: exact", "reward: [", r"line \d+: no valid YAML"),
        ("reward: exact", "steps: {min_tokens: 0}\nreward: exact", r"line 5: steps: .*at least 1"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(recipe, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(GOOD.replace(old, new, 1))
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def test_overrides(recipe) -> None:
    found = recipe(
        GOOD, "stages.2.strength=0.25", "model.name=qwen2-7b", "stages.1.args.max_steps=5", "output.merge=true"
    )
    assert (found.stages[2].strength, found.model.name, found.output.merge) == (0.25, "qwen2-7b", True)
    assert found.stages[1].args == {"learning_rate": 1e-4, "max_steps": 5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.2.strenght=1", r"--set stages.2.strenght=1: unknown key stages.2.strenght - did you mean strength\?"),
        ("stages.9.strength=1", r"there is no stages.9"),
        ("seed", r"no assignment"),
        ("seed=[", r"no valid YAML"),
        ("seed.deep=1", r"unknown|is .* - write"),
    ],
)
def test_a_wrong_override_names_itself(recipe, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(GOOD, override)


def test_the_resolved_recipe_is_the_same_recipe(recipe, tmp_path: Path) -> None:
    found = recipe()
    path = tmp_path / "resolved.yaml"
    path.write_text(found.dump())
    again = config.load(path)
    assert again.dump() == found.dump()
    assert [again.stage_hash(index) for index in range(3)] == [found.stage_hash(index) for index in range(3)]


def test_a_stage_s_hash_hangs_on_what_decides_its_result(recipe) -> None:
    base, later = recipe(), recipe(GOOD, "stages.2.strength=9")
    assert [base.stage_hash(index) == later.stage_hash(index) for index in range(3)] == [True, True, False]
    assert recipe(GOOD, "output.dir=elsewhere", "resume=never").stage_hash(2) == base.stage_hash(2)
    assert recipe(GOOD, "seed=1").stage_hash(0) != base.stage_hash(0)


def test_sft_on_samples_needs_a_sampling_stage(recipe) -> None:
    with pytest.raises(RecipeError, match="put a rejection_sampling stage before"):
        recipe(GOOD.replace("  - kind: rejection_sampling\n", "").replace("kind: sft", "kind: sft\n    data: sampled"))


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_are_found_from_anywhere_and_read(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (f"recipes/{name}", name, name.removesuffix(".yaml")):
        assert config.load(config.find(given)).name == name.removesuffix(".yaml")


def test_an_unknown_recipe_lists_the_packaged_ones() -> None:
    with pytest.raises(RecipeError, match=r"packaged: .*tiny.yaml"):
        config.find("nothing.yaml")
