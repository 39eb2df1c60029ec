"""``thinkkv bench`` as a user meets it: rows, bytes, turns, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from thinkkv.sdk.speed.contender import Contender, Held
from thinkkv.sdk.speed.measure import BLOCK, WARM_UP, measure

KEYS = {"runtime", "policy", "ratio", "context", "threads", "prefill_seconds", "decode_tokens_per_second"}


class Counting(Contender):
    """Notes its turns."""

    runtime, ratio = "none", 1.0

    def __init__(self, policy: str, turns: list[str]) -> None:
        self.policy, self._turns = policy, turns

    def prefill(self, ids, new_tokens):
        self._turns.append(f"{self.policy} reads {len(ids)}")

    def step(self):
        self._turns.append(f"{self.policy} steps")

    def held(self):
        return Held(3, 2, 1)


def test_contenders_take_turns_block_by_block():
    turns: list[str] = []
    rows = measure([Counting("a", turns), Counting("b", turns)], [5] * 7, new_tokens=BLOCK + 1, prefills=2)
    assert turns[:4] == ["a reads 7", "b reads 7"] * 2
    blocks = [["a steps"] * size + ["b steps"] * size for size in (WARM_UP + BLOCK, 1)]
    assert turns[4:] == [*blocks[0], *blocks[1]]
    assert [row["new_tokens"] for row in rows] == [BLOCK + 1] * 2  # warm-up steps are not timed
    assert [(row["cache_bytes"], row["used_bytes"], row["full_bytes"]) for row in rows] == [(3, 2, 1)] * 2


def test_every_setting_has_a_row_with_real_bytes(thinkkv, checkpoint):
    call = [
        "bench",
        "--model",
        checkpoint,
        "--contexts",
        "300,150",
        "--policies",
        "stock,full,snapkv",
        "--ratio",
        "0.3",
    ]
    done = thinkkv(
        *call, "--new-tokens", "8", "--ratio", "0.3", "--prefills", "1", "--threads", "1", "--no-memory", "--json"
    )
    assert done.code == 0
    rows = done.json["rows"]
    assert all(row.keys() >= KEYS for row in rows)
    assert [(row["policy"], row["context"]) for row in rows] == [
        (policy, context) for context in (300, 150) for policy in ("stock", "full", "snapkv")
    ]
    entry = 2 * 3 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32
    stock, full, snap = rows[:3]
    # A prompt, the warm-up steps and the timed ones.
    assert stock["cache_bytes"] == stock["full_bytes"] == full["full_bytes"] == entry * (300 + WARM_UP + 8)
    assert full["used_bytes"] == full["full_bytes"]
    assert snap["used_bytes"] == entry * (90 + WARM_UP + 8)
    assert {"processor", "cores"} <= done.json["machine"].keys()
    folder = Path("thinkkv-out/bench-tiny")
    assert json.loads((folder / "result.json").read_text()) == done.json
    assert (folder / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_peak_memory_comes_from_a_process_of_its_own(thinkkv, checkpoint):
    call = ["bench", "--model", checkpoint, "--contexts", "100", "--policies", "full", "--new-tokens", "2"]
    done = thinkkv(*call, "--prefills", "1", "--threads", "1", "--json")
    assert done.code == 0
    peak = done.json["rows"][0]["peak_rss_bytes"]
    assert 50 * 2**20 < peak < 2 * 2**30


def test_peak_memory_is_not_that_of_the_parent():
    ballast = bytearray(600 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from thinkkv.sdk.speed import peak; print(peak.own_peak())"
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) < 300 * 2**20


@pytest.mark.parametrize(
    ("more", "said", "code"),
    [
        (["--policies", "snap"], "snapkv", 2),
        (["--contexts", "0"], "positive", 2),
        (["--contexts", "2040", "--policies", "full"], "2048", 1),
        (["--runtime", "onnx", "--policies", "snapkv"], "exported", 2),
    ],
)
def test_a_wrong_request_is_one_line(thinkkv, checkpoint, more, said, code):
    done = thinkkv("bench", "--model", checkpoint, *more)
    assert said in done.error
    assert done.code == code
