"""Generated samples: their size, that a seed decides them, and that the answer can be read in them."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinkkv.patches.errors import MissingExtraError, ThinkKVError
from thinkkv.sdk.evaluation.filler import sentences, vocabulary
from thinkkv.sdk.evaluation.tasks import GENERATED, task_named
from thinkkv.sdk.evaluation.tasks.haystack_reasoning import OBJECTS, PEOPLE, PLACES
from thinkkv.sdk.evaluation.tasks.perplexity import CONTINUATION, Perplexity
from thinkkv.sdk.evaluation.tasks.word_count import WORDS

WORD = re.compile(r"\w+|[^\w\s]")
LONGEST_PIECE = 30
"""Words in the longest sentence of the filler, generously."""


class WordTokenizer:
    """One token per word or sign, as many ids as there are words."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> object:
        ids = [self._ids.setdefault(word, len(self._ids)) for word in WORD.findall(text)]
        return type("Encoding", (), {"input_ids": ids})


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


TOKENIZER = WordTokenizer()
TASKS = sorted(GENERATED)


@given(name=st.sampled_from(TASKS), size=st.integers(150, 900), index=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_a_sample_is_as_long_as_fits(name, size, index, seed):
    sample = task_named(name, read).sample(TOKENIZER, size, index, seed)
    assert size - LONGEST_PIECE < sample.tokens <= size


@given(name=st.sampled_from(TASKS), index=st.integers(0, 10**6))
def test_a_seed_and_a_number_decide_a_sample(name, index):
    task = task_named(name, read)
    sample = task.sample(TOKENIZER, 300, index, 1)
    assert sample.sample == task.sample(TOKENIZER, 300, index, 1).sample
    assert sample.sample != task.sample(TOKENIZER, 300, index, 2).sample
    assert sample.sample != task.sample(TOKENIZER, 300, index + 1, 1).sample


@given(
    name=st.sampled_from(sorted(set(TASKS) - {"word-count", "variable-tracking"})),
    size=st.integers(150, 900),
    index=st.integers(0, 10**6),
)
def test_every_answer_stands_in_the_context_once_and_not_in_the_question(name, size, index):
    sample = task_named(name, read).sample(TOKENIZER, size, index, 0).sample
    for answer in sample.answers:
        assert len(re.findall(rf"\b{answer}\b", sample.context)) == 1
        assert answer not in sample.question


@given(text=st.integers(0, 10**6), size=st.integers(150, 600))
def test_every_key_of_a_text_is_asked_for_in_turn(text, size):
    task = task_named("niah-every-key", read)
    found = [task.sample(TOKENIZER, size, 4 * text + asked, 0) for asked in range(4)]
    assert {task.text_of(4 * text + asked) for asked in range(4)} == {text}
    assert len({sample.context for sample in found}) == 1
    for sample in (one.sample for one in found):
        key = re.search(r"special number of the (.+?)\?", sample.question)[1]
        assert re.findall(rf"The special number of the {key} is (\d+)\.", sample.context) == list(sample.answers)
    assert len({sample.sample.answers for sample in found}) == 4


@given(index=st.integers(0, 10**6))
def test_the_variables_of_an_answer_form_the_asked_chain(index):
    sample = task_named("variable-tracking", read).sample(TOKENIZER, 400, index, 0).sample
    value = re.search(r"have the value (\d{5})\?", sample.question)[1]
    links = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context))

    def resolved(name: str) -> str:
        return resolved(links[name]) if name in links else name

    assert {name for name in links if resolved(name) == value} == set(sample.answers)


@given(index=st.integers(0, 10**6), size=st.integers(200, 900))
def test_the_common_words_are_the_most_common(index, size):
    sample = task_named("word-count", read).sample(TOKENIZER, size, index, 0).sample
    listed = sample.context.split("\n\n")[1].split(", ")
    rare = [listed.count(word) for word in set(listed) - set(sample.answers)]
    assert min(listed.count(word) for word in sample.answers) > 2 * max(rare)


def test_filler_neither_repeats_soon_nor_holds_what_tasks_ask_for():
    text = list(itertools.islice(sentences(random.Random(0)), 300))
    assert len(set(text)) > 280
    assert not re.search(r"[\d{}]", " ".join(text))
    assert {word.lower() for word in (*PEOPLE, *OBJECTS, *PLACES)} & vocabulary() == set()


def test_facts_are_spread_over_the_whole_context():
    task = task_named("niah-single", read)
    places = []
    for index in range(60):
        context = task.sample(TOKENIZER, 400, index, 0).sample.context
        places.append(context.index("The special number") / len(context))
    assert min(places) < 0.2
    assert max(places) > 0.8
    assert 0.4 < sum(places) / len(places) < 0.65


def test_a_size_below_the_task_itself_is_refused():
    with pytest.raises(ThinkKVError, match="too short"):
        task_named("niah-multikey", read).sample(TOKENIZER, 40, 0, 0)


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ThinkKVError, match="niah-single"):
        task_named("needle", read)


class CountingTokenizer:
    """Notes how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, text: str) -> Any:
        self.calls += 1
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


def test_a_text_is_tokenized_once():
    task, tokenizer = Perplexity(" ".join(map(str, range(500)))), CountingTokenizer()
    passages = {task.sample(tokenizer, 200, number, 0).context for number in range(4)}
    assert len(passages) == 4
    assert tokenizer.calls == 1


def test_passages_of_a_text_are_its_own_and_differ(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"word{i}" for i in range(2000)))
    task = task_named(f"perplexity:{path}", read)
    samples = [task.sample(TOKENIZER, 500, index, 0) for index in range(8)]
    whole = TOKENIZER(path.read_text()).input_ids
    for sample in samples:
        passage = [*sample.context, *sample.question]
        start = whole.index(passage[0])
        assert passage == whole[start : start + 500]
        assert len(sample.question) == CONTINUATION
    assert len({sample.context[0] for sample in samples}) == 8
    with pytest.raises(ThinkKVError, match="longer text"):
        task.sample(TOKENIZER, 2000, 0, 0)


def test_own_data_is_asked_as_it_is(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"context": "The cat is red.", "question": "Which colour?", "answer": "red"},
        {
            "context": "The cat is red and old.",
            "question": "How is it?",
            "answer": ["red", "old"],
            "answer_prefix": "It is",
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_named(f"data:{path}", read)
    assert (task.name, task.count(25), task.sizes(TOKENIZER, [4000])) == ("data:mine.jsonl", 2, [13])
    second = task.sample(TOKENIZER, 0, 1, 0).sample
    assert (second.question, second.answers) == ("\n\nHow is it? It is", ("red", "old"))
    assert task.score(second, "old, not blue") == 0.5
    assert [task.text_of(line) for line in range(2)] == [0, 1]


def test_lines_of_one_context_share_its_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    contexts = ["a text", "another", "a text", "another", "a third"]
    rows = [{"context": context, "question": f"{i}?", "answer": "x"} for i, context in enumerate(contexts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_named(f"data:{path}", read)
    assert [task.text_of(line) for line in range(5)] == [0, 1, 0, 1, 4]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"context": "a", "question": "b"}', '{"context": "", "question": "b", "answer": "c"}']
)
def test_a_bad_line_of_own_data_is_named(tmp_path, line):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"context": "a", "question": "b", "answer": "c"}\n' + line + "\n")
    with pytest.raises(ThinkKVError, match=r"mine\.jsonl:2"):
        task_named(f"data:{path}", read)


def test_reasoning_names_its_extra_where_that_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="gym"):
        task_named("reasoning", read)


def test_reasoning_is_judged_by_its_own_verifier():
    pytest.importorskip("reasoning_gym")
    task = task_named("reasoning:chain_sum", read)
    sample = task.sample(TOKENIZER, 300, 3, 0).sample
    assert task.score(sample, f" {sample.answers[0]}\n\nProblem: more") == 1.0
    assert task.score(sample, " no idea") < 0.5


def test_a_new_word_list_stays_without_repeats():
    assert len(set(WORDS)) == len(WORDS)
