"""``thinkkv eval`` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

KEYS = {"task", "policy", "ratio", "context", "samples", "score", "ci95", "cache_bytes", "question", "used_bytes"}


def arguments(checkpoint: Path, *more: object) -> list[object]:
    return ["eval", "--model", checkpoint, "--contexts", "600", "--samples", "2", *more]


def test_every_cell_has_a_row_and_a_second_call_does_nothing_again(thinkkv, checkpoint):
    call = arguments(checkpoint, "--tasks", "passkey,perplexity", "--policies", "full,snapkv", "--ratio", "0.5,0.25")
    done = thinkkv(*call, "--json")
    assert done.code == 0
    found = done.json["rows"]
    assert all(row.keys() >= KEYS for row in found)
    assert len(found) == 3 * 3  # passkey asked in two ways, perplexity in one
    bytes_of = {row["ratio"]: row["used_bytes"] for row in found if row["task"] == "perplexity"}
    assert bytes_of[0.25] < bytes_of[0.5] < bytes_of[1.0]
    folder = Path("thinkkv-out/eval-tiny")
    assert json.loads((folder / "result.json").read_text()) == done.json
    assert done.json.keys() >= {"machine", "versions", "commit", "command", "seconds"}
    assert done.json["command"].split()[0] == "thinkkv"
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")
    written = (folder / "samples.jsonl").read_bytes()
    again = thinkkv(*call, "--json")
    assert again.json["rows"] == found
    assert (folder / "samples.jsonl").read_bytes() == written


def test_retrieval_kv_gets_a_profile(thinkkv, checkpoint):
    call = arguments(checkpoint, "--tasks", "passkey", "--policies", "retrieval-kv", "--ratio", "0.6", "--out", "out")
    done = thinkkv(*call, "--question", "after", "--json")
    assert done.code == 0
    assert [row["question"] for row in done.json["rows"]] == ["after"]
    assert Path("out/retrieval-profile/profile.json").exists()


def test_policies_that_rank_heads_share_a_profile_and_a_folder(thinkkv, checkpoint):
    call = arguments(checkpoint, "--tasks", "passkey", "--question", "after", "--ratio", "0.6", "--out", "out")
    call.append("--json")
    profile, samples = Path("out/retrieval-profile/profile.json"), Path("out/samples.jsonl")
    thinkkv(*call, "--policies", "retrieval-kv")
    before = profile.read_bytes(), samples.read_bytes().partition(b"\n")[2]
    done = thinkkv(*call, "--policies", "retrieval-kv,rehearsed-kv")
    assert [row["policy"] for row in done.json["rows"]] == ["retrieval-kv", "rehearsed-kv"]
    assert profile.read_bytes() == before[0]
    assert samples.read_bytes().partition(b"\n")[2].startswith(before[1])
    assert done.json["options"].keys() == {"retrieval-kv", "rehearsed-kv"}
    assert thinkkv(*call, "--policies", "rehearsed-kv", "--profile", "out/retrieval-profile").code == 0


@pytest.mark.parametrize("order", [("snapkv", "snapkv,retrieval-kv"), ("retrieval-kv", "snapkv")])
def test_policies_are_added_to_a_folder_with_a_profile_or_without(thinkkv, checkpoint, order):
    call = arguments(checkpoint, "--tasks", "passkey", "--question", "after", "--ratio", "0.6", "--out", "out")
    for policies in order:
        done = thinkkv(*call, "--policies", policies, "--json")
        assert done.code == 0, done.err
        assert [row["policy"] for row in done.json["rows"]] == policies.split(",")
    assert "retrieval-kv" in done.json["profiles"]


@pytest.mark.parametrize(
    ("more", "said", "code"),
    [
        (["--tasks", "needles"], "niah-single", 2),
        (["--policies", "snap"], "snapkv", 2),
        (["--ratio", "0.4,half"], "numbers", 2),
        (["--ratio", "1.5"], "1.5", 2),
        (["--contexts", "4000"], "2048", 1),
        (["--tasks", "data:none.jsonl"], "none.jsonl", 1),
        (["--tasks", "passkey", "--policies", "snapkv", "--ratio", "0.01"], "--ratio", 2),
    ],
)
def test_a_wrong_request_is_one_line(thinkkv, checkpoint, more, said, code):
    done = thinkkv(*arguments(checkpoint, *more))
    assert said in done.error
    assert done.code == code


def test_without_a_model_and_a_patch_the_line_names_patch(thinkkv):
    assert "thinkkv patch" in thinkkv("eval").error
