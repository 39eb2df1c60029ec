"""``thinkkv patch`` and ``thinkkv generate`` as a user meets them: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers import AutoTokenizer

from tests.tiny_models import new_model
from thinkkv.sdk import verification
from thinkkv.sdk.cli.options import CACHE_DTYPES, POLICY_NAMES, PROFILE_SCORES
from thinkkv.sdk.policies import POLICIES
from thinkkv.sdk.policies.policy import CacheDtype

PROMPT = "the lamp of the harbour was lit by mira ost. " * 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, char_tokenizer: Any) -> Path:
    """A tiny random Qwen2 checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-qwen2"
    new_model("qwen2", 2).save_pretrained(folder)
    char_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt_tokens(checkpoint: Path) -> int:
    """How many tokens PROMPT has for the checkpoint's own tokenizer."""
    return len(AutoTokenizer.from_pretrained(checkpoint)(PROMPT).input_ids)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Two prompts, the longer one with a middle to evict."""
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, PROMPT[:400])))
    return path


def test_patch_does_its_whole_job_on_a_local_checkpoint(thinkkv, checkpoint, task, tmp_path, prompt_tokens):
    done = thinkkv("patch", "--model", checkpoint, "--task", task, "--json")
    assert done.code == 0
    result = done.json
    assert (result["architecture"], result["policy"], result["ratio"]) == ("qwen2", "task-kv", 0.4)
    assert (result["layers"], result["kv_heads"], len(result["heterogeneous"])) == (3, 2, 3)
    assert result["bytes"]["used"] <= result["bytes"]["promised"] == int(0.4 * result["bytes"]["full"])
    assert result["prompt_tokens"] == prompt_tokens
    checks = result["verified"]
    assert [checks[name] for name in checks if name != "max_abs_logit_diff"] == [True, True, True]
    folder = tmp_path / result["profile"]
    assert {path.name for path in folder.iterdir()} == {"profile.json", "heads.png", "result.json"}
    assert json.loads((folder / "result.json").read_text()) == result


def test_patch_by_retrieval_needs_no_prompts(thinkkv, checkpoint):
    done = thinkkv("patch", "--model", checkpoint, "--score", "retrieval", "--out", "found", "--json")
    assert done.code == 0
    assert done.json["policy"] == "retrieval-kv"
    assert json.loads(Path("found/profile.json").read_text())["score"] == "retrieval"


def test_a_policy_without_classes_gets_no_profile(thinkkv, checkpoint, task):
    done = thinkkv("patch", "--model", checkpoint, "--policy", "snapkv", "--task", task, "--json")
    assert done.code == 0
    assert done.json["profile"] is None
    assert done.json["heterogeneous"] == [[], [], []]


def test_a_failed_verification_fails_the_command(thinkkv, checkpoint, task, monkeypatch):
    monkeypatch.setattr(verification, "TOLERANCE", dict.fromkeys(verification.TOLERANCE, -1.0))
    done = thinkkv("patch", "--model", checkpoint, "--task", task, "--json")
    assert done.code == 1
    assert "verification" in done.error


def test_an_interrupted_patch_is_never_taken_for_a_finished_one(thinkkv, checkpoint, task, monkeypatch):
    assert thinkkv("patch", "--model", checkpoint, "--task", task).code == 0

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verification, "verify", interrupted)
    assert thinkkv("patch", "--model", checkpoint, "--task", task).code == 130
    assert "thinkkv patch" in thinkkv("generate", "--prompt", "hello").error


def test_generate_takes_model_profile_and_budget_of_the_newest_patch(thinkkv, checkpoint, task, prompt_tokens):
    assert thinkkv("patch", "--model", checkpoint, "--task", task, "--ratio", "0.5").code == 0
    done = thinkkv("generate", "--prompt", PROMPT, "--max-new-tokens", "5", "--json")
    assert done.code == 0
    assert done.json["policy"] == "task-kv"
    assert (done.json["prompt_tokens"], done.json["new_tokens"]) == (prompt_tokens, 5)
    prompt_bytes = done.json["bytes"]["full"] * prompt_tokens // (prompt_tokens + 4)
    appended = done.json["bytes"]["full"] - prompt_bytes
    assert done.json["bytes"]["promised"] == prompt_bytes // 2 + appended
    assert set(done.json["seconds"]) == {"prefill", "decode"}
    assert str(checkpoint) in done.err.replace("\n", "")


def test_generate_takes_the_newest_profile_for_another_policy_that_it_serves(thinkkv, checkpoint):
    assert thinkkv("patch", "--model", checkpoint, "--score", "retrieval", "--ratio", "0.5").code == 0
    call = ("generate", "--prompt", PROMPT, "--max-new-tokens", "5", "--json")
    done = thinkkv(*call, "--policy", "rehearsed-kv")
    assert (done.code, done.json["policy"]) == (0, "rehearsed-kv")
    assert done.json["bytes"]["used"] < done.json["bytes"]["full"]
    assert thinkkv(*call, "--policy", "snapkv").json["policy"] == "snapkv"


def test_rehearsed_kv_is_patched_and_verified(thinkkv, checkpoint):
    done = thinkkv("patch", "--model", checkpoint, "--policy", "rehearsed-kv", "--ratio", "0.5", "--json")
    assert (done.code, done.json["policy"], done.json["score"]) == (0, "rehearsed-kv", "retrieval")
    assert done.json["verified"]["matches_masked_reference"]


def test_generate_prints_its_text_and_nothing_else_on_stdout(thinkkv, checkpoint):
    arguments = ("generate", "--model", checkpoint, "--policy", "full", "--prompt", "a lamp", "--max-new-tokens", "6")
    shown = thinkkv(*arguments)
    assert shown.code == 0
    assert shown.out == thinkkv(*arguments, "--json").json["text"] + "\n"


@pytest.mark.parametrize("mode", ["append", "bounded"])
def test_generate_in_both_decode_modes(thinkkv, checkpoint, mode):
    done = thinkkv(
        "generate", "--model", checkpoint, "--prompt", PROMPT, "--decode", mode, "--max-new-tokens", "150", "--json"
    )
    assert done.code == 0
    assert done.json["bytes"]["used"] == done.json["bytes"]["planned"] <= done.json["bytes"]["promised"]


def test_generate_stores_more_tokens_in_the_same_bytes(thinkkv, checkpoint):
    def used(*options):
        call = ("generate", "--model", checkpoint, "--policy", "full", "--prompt", PROMPT, "--max-new-tokens", "5")
        done = thinkkv(*call, *options, "--json")
        assert done.code == 0
        return done.json["bytes"]["used"], done.json["bytes"]["full"]

    (stored, full), (small, same), (smaller, too) = used(), used("--cache-dtype", "int8"), used("--cache-dtype", "k8v4")
    assert stored == full == same == too
    assert full / 4 < small < full / 2.5  # the checkpoint is in float32
    assert full / 5.5 < smaller < full / 3


def test_generate_reads_standard_input_and_files(thinkkv, checkpoint, tmp_path, monkeypatch):
    import io

    (tmp_path / "prompt.txt").write_text("a lamp")
    common = ("generate", "--model", checkpoint, "--max-new-tokens", "4", "--json")
    from_file = thinkkv(*common, "--prompt-file", "prompt.txt").json["text"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a lamp")))
    assert thinkkv(*common).json["text"] == from_file


WRONG_REQUESTS = {
    "patch without a model": ("patch",),
    "ratio zero": ("patch", "--model", "x", "--ratio", "0"),
    "ratio three": ("patch", "--model", "x", "--ratio", "3"),
    "ratio and budget": ("patch", "--model", "x", "--ratio", "0.4", "--budget", "100"),
    "budget zero": ("patch", "--model", "x", "--budget", "0"),
    "unknown policy": ("patch", "--model", "x", "--policy", "h2o"),
    "score of another policy": ("patch", "--model", "x", "--policy", "task-kv", "--score", "retrieval"),
    "score without classes": ("patch", "--model", "x", "--policy", "snapkv", "--score", "distance"),
    "unknown option": ("generate", "--modle", "x"),
    "unknown command": ("quantise",),
    "empty prompt": ("generate", "--model", "x", "--prompt", "  "),
    "two prompts": ("generate", "--model", "x", "--prompt", "a", "--prompt-file", "b"),
    "no tokens wanted": ("generate", "--model", "x", "--prompt", "a", "--max-new-tokens", "0"),
}


@pytest.mark.parametrize("arguments", WRONG_REQUESTS.values(), ids=WRONG_REQUESTS)
def test_a_wrong_request_is_one_line_and_exit_2(thinkkv, arguments):
    done = thinkkv(*arguments)
    assert (done.code, done.out) == (2, "")
    assert len(done.error) > 20


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("task.jsonl", '{"prompt": "a"}\n{"question": "b"}\n', "line 2"),
        ("task.jsonl", '{"prompt": "a"}\nnot json\n', "line 2"),
        ("task.jsonl", "\n\n", "no prompt"),
        ("task.txt", "  \n", "no prompt"),
        ("task.txt", b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_an_unusable_task_file_is_named(thinkkv, checkpoint, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    done = thinkkv("patch", "--model", checkpoint, "--task", name)
    assert done.code == 1
    assert name in done.error
    assert expected in done.error


@pytest.mark.parametrize("command", ["patch", "generate"])
def test_a_missing_model_fails_with_one_line(thinkkv, command):
    done = thinkkv(command, "--model", "no-such-model", *(("--prompt", "a") if command == "generate" else ()))
    assert done.code == 1
    assert "no-such-model" in done.error


def test_missing_files_and_folders_are_named(thinkkv, checkpoint, tmp_path):
    assert "nowhere.txt" in thinkkv("generate", "--model", checkpoint, "--prompt-file", "nowhere.txt").error
    assert "nowhere" in thinkkv("generate", "--model", checkpoint, "--profile", "nowhere", "--prompt", PROMPT).error
    (tmp_path / "taken").write_text("a file where a folder should be")
    assert thinkkv("patch", "--model", checkpoint, "--out", "taken").code == 2


def test_a_budget_below_the_smallest_names_the_smallest(thinkkv, checkpoint, prompt_tokens):
    done = thinkkv("generate", "--model", checkpoint, "--prompt", PROMPT, "--ratio", "0.05")
    assert done.code == 2
    assert f"--ratio {math.ceil(100 * 48 / prompt_tokens) / 100:g} " in done.error  # 16 sinks, 32 in the window


def test_a_prompt_beyond_the_context_is_refused_before_the_work(thinkkv, checkpoint):
    done = thinkkv("generate", "--model", checkpoint, "--prompt", PROMPT * 5, "--json")
    assert done.code == 1
    assert "2048" in done.error


def test_an_alias_that_is_not_here_fails_within_ten_seconds(tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    start = time.monotonic()
    command = [sys.executable, "-c", "from thinkkv.sdk.cli import main; main()", "patch", "--model", "qwen2-7b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert time.monotonic() - start < 10
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert "qwen2-7b" in done.stderr


def test_policy_names_of_the_command_line_are_the_policies():
    assert tuple(POLICIES) == POLICY_NAMES
    scores = {name: policy.profile_score for name, policy in POLICIES.items()}
    assert {name: score for name, score in scores.items() if score} == PROFILE_SCORES


def test_cache_dtypes_of_the_command_line_are_those_of_policies():
    assert get_args(CacheDtype) == CACHE_DTYPES
