"""A run against plain generation on a patched model, sample by sample; and a run that was killed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from thinkkv import sdk
from thinkkv.patches.errors import BudgetError, ThinkKVError
from thinkkv.sdk.evaluation.journal import Journal
from thinkkv.sdk.evaluation.rows import rows
from thinkkv.sdk.evaluation.runner import ANSWER_MARGIN, Evaluation
from thinkkv.sdk.evaluation.sample import Encoded, Sample
from thinkkv.sdk.evaluation.setting import settings
from thinkkv.sdk.evaluation.tasks.task import Task

POLICIES = ["full", "snapkv", "task-kv+recent=40", "streaming-llm"]


class Lengths(Task):
    """Random tokens of different lengths, so that batches are padded."""

    def __init__(self, metric: str = "accuracy") -> None:
        self.name, self.metric = "lengths", metric  # type: ignore[misc]

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(2, 90, (size - 3 * index,), generator=draw).tolist()
        question = 9 if self.metric == "perplexity" else 6 + index
        return Encoded(Sample("", "", ("x",)), tuple(ids[:-question]), tuple(ids[-question:]))


@pytest.fixture
def evaluation(model, char_tokenizer) -> Evaluation:
    return Evaluation(model, char_tokenizer, settings(POLICIES, [0.5]), {})


def generated(model: Any, setting: Any, sample: Encoded, question: str, new: int) -> tuple[list[int], int]:
    """The answer of ``generate`` on a patched model, one sample alone, and the bytes after compression."""
    chunks = [sample.context, sample.question] if question == "after" else [sample.context + sample.question]
    with sdk.apply(model, policy=setting.policy, ratio=setting.ratio) as handle, torch.inference_mode():
        cache = handle.new_cache()
        held = 0
        for chunk in chunks:
            out = model(torch.tensor([chunk]), past_key_values=cache, use_cache=True)
            held = held or handle.report(cache).bytes.physical
        said = []
        for _ in range(new):
            said.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([[said[-1]]]), past_key_values=cache, use_cache=True)
    return said, held


@pytest.mark.parametrize("question", ["in-window", "after"])
def test_a_batched_run_says_what_generation_says_sample_by_sample(evaluation, tmp_path, question):
    task = Lengths()
    cells = evaluation.cells([task], [150], [question])
    journal = Journal(tmp_path / "samples.jsonl", {})
    evaluation.run(cells, 3, journal, lambda label: iter)
    assert len(journal.outcomes) == 3 * len(POLICIES)
    for setting in evaluation.settings:
        for number in range(3):
            outcome = journal.outcomes["lengths", question, 150, number, setting.name, setting.ratio]
            sample = task.sample(evaluation.tokenizer, 150, number, 0)
            said, held = generated(evaluation.model, setting, sample, question, ANSWER_MARGIN + 1)
            assert outcome.said == evaluation.tokenizer.decode(said, skip_special_tokens=True)
            assert outcome.cache_bytes == pytest.approx(held, rel=0.2)  # one arena for the batch


class Growing(Lengths):
    """The expected answers get longer from sample to sample."""

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        found = super().sample(tokenizer, size, index, seed)
        return Encoded(Sample("", "", ("x" * (1 + 4 * index),)), found.context, found.question)


def test_an_answer_is_as_long_in_a_batch_as_alone(evaluation, tmp_path):
    found = []
    for batch_tokens in (8192, 1):
        journal = Journal(tmp_path / f"{batch_tokens}.jsonl", {})
        one = replace(evaluation, batch_tokens=batch_tokens)
        one.run(one.cells([Growing()], [150], ["after"]), 3, journal, lambda label: iter)
        found.append({key: outcome.said for key, outcome in journal.outcomes.items()})
    assert found[0] == found[1]
    lengths = {number: len(text) for (_, _, _, number, policy, _), text in found[0].items() if policy == "full"}
    assert lengths[0] < lengths[1] < lengths[2]


class Documents(Lengths):
    """Two texts, the first asked about once, the second three times."""

    def text_of(self, index: int) -> int:
        return min(index, 1)

    def sample(self, tokenizer: Any, size: int, index: int, seed: int) -> Encoded:
        text = super().sample(tokenizer, size, min(index, 1), seed)
        question = super().sample(tokenizer, size, index, seed).question
        return Encoded(Sample("", "", ("x" * (1 + 2 * index),)), text.context, question)


@pytest.mark.parametrize("batch_tokens", [8192, 1])
@pytest.mark.parametrize("question", ["in-window", "after"])
def test_what_is_asked_of_one_text_is_answered_as_if_it_were_asked_alone(evaluation, tmp_path, question, batch_tokens):
    class Alone(Documents):
        text_of = Lengths.text_of

    found, forwards = [], []
    for task, tokens in ((Documents(), batch_tokens), (Alone(), 1)):
        read: list[int] = []
        hook = evaluation.model.model.register_forward_hook(
            lambda module, args, kwargs, out, read=read: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        journal = Journal(tmp_path / f"{type(task).__name__}.jsonl", {})
        one = replace(evaluation, batch_tokens=tokens)
        one.run(one.cells([task], [150], [question]), 4, journal, lambda label: iter)
        hook.remove()
        found.append(journal.outcomes)
        forwards.append(sum(width > 100 for width in read))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 4 * len(POLICIES)
    for key, outcome in found[0].items():
        alone = found[1][key]
        assert (outcome.said, outcome.score, outcome.tokens) == (alone.said, alone.score, alone.tokens)
        assert outcome.cache_bytes == pytest.approx(alone.cache_bytes, rel=0.2)
        assert outcome.loss == pytest.approx(alone.loss, abs=1e-4)
        assert outcome.divergence == pytest.approx(alone.divergence, abs=1e-4)
    texts = 2 if question == "after" else 4
    assert forwards == [1 if batch_tokens > 1 else texts, 4]


def predicted(evaluation: Evaluation, policy: Any, ratio: float, chunks: list[Any], count: int) -> torch.Tensor:
    """[count, V] float64 log-probabilities before each of the last tokens that are fed, one sequence alone."""
    with sdk.apply(evaluation.model, policy=policy, ratio=ratio) as handle, torch.inference_mode():
        cache = handle.new_cache()
        logits = [
            evaluation.model(torch.tensor([chunk]), past_key_values=cache, use_cache=True).logits[0] for chunk in chunks
        ]
    return torch.log_softmax(torch.cat(logits)[-count - 1 : -1].double(), dim=-1)


def check_losses(outcome: Any, found: torch.Tensor, whole: torch.Tensor, ids: Any, name: str) -> None:
    """One outcome against what single sequences say under its setting and with the full cache."""
    wanted = torch.nn.functional.nll_loss(found, torch.tensor(ids))
    assert getattr(outcome, name) == pytest.approx(float(wanted), abs=1e-4)
    distance = (whole.exp() * (whole - found)).sum(dim=-1).mean()
    assert outcome.divergence == pytest.approx(float(distance), abs=1e-4)
    assert (outcome.divergence == 0) == (outcome.policy == "full")


@pytest.mark.parametrize("question", ["in-window", "after"])
@pytest.mark.parametrize("names", [POLICIES, POLICIES[1:]], ids=["beside the full cache", "alone"])
def test_answer_losses_are_those_of_the_patched_model(evaluation, tmp_path, question, names):
    """Answers of different lengths in one batch, against one sequence at a time."""
    task, evaluation = Growing(), replace(evaluation, settings=settings(names, [0.5]))
    journal = Journal(tmp_path / "samples.jsonl", {})
    evaluation.run(evaluation.cells([task], [150], [question]), 3, journal, lambda label: iter)
    for setting, number in itertools.product(evaluation.settings, range(3)):
        sample = task.sample(evaluation.tokenizer, 150, number, 0)
        answer = evaluation.tokenizer(f" {sample.sample.answers[0]}").input_ids
        first = [sample.context, sample.question] if question == "after" else [sample.context + sample.question]
        chunks = [*first, *([token] for token in answer)]
        found = predicted(evaluation, setting.policy, setting.ratio, chunks, len(answer))
        whole = predicted(evaluation, "full", 1.0, chunks, len(answer))
        outcome = journal.outcomes["lengths", question, 150, number, setting.name, setting.ratio]
        check_losses(outcome, found, whole, answer, "loss")
    for row in rows(journal, evaluation.cells([task], [150], [question]), evaluation.settings, 3):
        mine = [journal.outcomes["lengths", question, 150, n, row["policy"], row["ratio"]] for n in range(3)]
        assert row["answer_loss"] == pytest.approx(sum(one.loss for one in mine) / 3, abs=1e-4)
        assert row["divergence"] == pytest.approx(sum(one.divergence for one in mine) / 3, abs=1e-4)


def test_losses_are_those_of_the_patched_model(evaluation, tmp_path):
    task = Lengths("perplexity")
    journal = Journal(tmp_path / "samples.jsonl", {})
    evaluation.run(evaluation.cells([task], [150], ["in-window"]), 2, journal, lambda label: iter)
    sample = task.sample(None, 150, 1, 0)
    chunks = [sample.context, sample.question]
    whole = predicted(evaluation, "full", 1.0, chunks, 8)
    for setting in evaluation.settings:
        outcome = journal.outcomes["lengths", "after", 150, 1, setting.name, setting.ratio]
        found = predicted(evaluation, setting.policy, setting.ratio, chunks, 8)
        check_losses(outcome, found, whole, sample.question[1:], "score")


def test_rows_of_an_older_release_have_no_divergence(evaluation, tmp_path):
    journal = Journal(tmp_path / "samples.jsonl", {})
    cells = evaluation.cells([Lengths()], [150], ["after"])
    evaluation.run(cells, 2, journal, lambda label: iter)
    key = next(iter(journal.outcomes))
    journal.outcomes[key] = replace(journal.outcomes[key], divergence=None)
    found = [row["divergence"] for row in rows(journal, cells, evaluation.settings, 2)]
    assert found[0] is None
    assert None not in found[1:]


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(evaluation, tmp_path):
    cells = evaluation.cells([Lengths()], [150], ["after"])
    whole = Journal(tmp_path / "whole.jsonl", {"seed": 0})
    evaluation.run(cells, 3, whole, lambda label: iter)
    path = tmp_path / "killed.jsonl"
    path.write_bytes((tmp_path / "whole.jsonl").read_bytes()[:-400])  # in the middle of a line
    resumed = Journal(path, {"seed": 0})
    assert 0 < len(resumed.outcomes) < len(whole.outcomes)
    done = len(resumed.outcomes)
    evaluation.run(cells, 3, resumed, lambda label: iter)
    assert said(resumed) == said(whole) == said(Journal(path, {"seed": 0}))
    assert len(path.read_text().splitlines()) == 1 + len(whole.outcomes) > done
    wanted = [row["score"] for row in rows(whole, cells, evaluation.settings, 3)]
    assert [row["score"] for row in rows(resumed, cells, evaluation.settings, 3)] == wanted


def said(journal: Journal) -> dict[Any, tuple[float, str]]:
    """Bytes are left out: a sample's share of its batch's storage varies a little with the batch."""
    return {key: (outcome.score, outcome.said) for key, outcome in journal.outcomes.items()}


def test_results_of_another_run_are_not_mixed_in(tmp_path):
    Journal(tmp_path / "samples.jsonl", {"seed": 0})
    with pytest.raises(ThinkKVError, match="seed"):
        Journal(tmp_path / "samples.jsonl", {"seed": 1})


def test_a_policy_with_a_profile_is_added_to_a_folder(evaluation, tmp_path):
    path = tmp_path / "samples.jsonl"
    evaluation.run(evaluation.cells([Lengths()], [150], ["after"]), 1, Journal(path, {}, {}), lambda label: iter)
    before = path.read_bytes()
    profile = {"prompts": 8, "sha256": "a"}
    added = Journal(path, {}, {"retrieval-kv": profile})
    assert path.read_bytes().partition(b"\n")[2] == before.partition(b"\n")[2]
    assert len(added.outcomes) == len(POLICIES)
    assert Journal(path, {}, {}).profiles == {"retrieval-kv": profile}  # and one without is added to that


@pytest.mark.parametrize(
    ("first", "then"),
    [(None, {"sha256": "a"}), ({"sha256": "a"}, None), ({"sha256": "a"}, {"sha256": "b"})],
    ids=["none, then one", "one, then none", "two"],
)
def test_a_policy_keeps_its_profile_in_a_folder(evaluation, tmp_path, first, then):
    path = tmp_path / "samples.jsonl"
    journal = Journal(path, {}, {"task-kv": first})
    evaluation.run(evaluation.cells([Lengths()], [150], ["after"]), 1, journal, lambda label: iter)
    before = path.read_bytes()
    with pytest.raises(ThinkKVError, match="profile of task-kv"):
        Journal(path, {}, {"task-kv": then})
    assert path.read_bytes() == before
    assert len(Journal(path, {}, {"task-kv": first}).outcomes) == len(POLICIES)


def test_a_policy_keeps_its_options_in_a_folder(evaluation, tmp_path):
    """Defaults may change from release to release, the name that outcomes go by does not."""
    path = tmp_path / "samples.jsonl"
    journal = Journal(path, {}, {}, evaluation.options)
    evaluation.run(evaluation.cells([Lengths()], [150], ["after"]), 1, journal, lambda label: iter)
    before = path.read_bytes()
    changed = {"snapkv": {"observation_window": 32, "pooling": 5}}
    with pytest.raises(ThinkKVError, match=r"options of snapkv .*'pooling': 7.*'pooling': 5"):
        Journal(path, {}, {}, changed)
    assert path.read_bytes() == before
    added = Journal(path, {}, {}, evaluation.options | {"snapkv+pooling=5": changed["snapkv"]})
    assert added.options == evaluation.options | {"snapkv+pooling=5": changed["snapkv"]}
    assert len(added.outcomes) == len(POLICIES)


def test_options_that_an_older_folder_did_not_note_stay_unknown(evaluation, tmp_path):
    path = tmp_path / "samples.jsonl"
    evaluation.run(evaluation.cells([Lengths()], [150], ["after"]), 1, Journal(path, {}), lambda label: iter)
    assert Journal(path, {}, {}, evaluation.options).options == {}


def test_an_impossible_ratio_is_refused_before_anything_runs(evaluation, tmp_path):
    impossible = replace(evaluation, settings=settings(["full", "snapkv"], [0.1]))
    journal = Journal(tmp_path / "samples.jsonl", {})
    with pytest.raises(BudgetError, match="--ratio"):
        impossible.run(impossible.cells([Lengths()], [150], ["after"]), 1, journal, lambda label: iter)
    assert not journal.outcomes


def test_a_size_beyond_the_context_is_refused(evaluation):
    with pytest.raises(ThinkKVError, match="2048"):
        evaluation.cells([Lengths()], [2048], ["after"])
