"""A text that is read once and asked about from a file, beside a text that is read again for each question.

    python benchmarks/saved_cache.py --out benchmarks/results/saved_cache.json
    python benchmarks/saved_cache.py --quick         # a look, below a minute

The text of the demo and its questions, by what ``thinkkv generate --save-cache`` and ``--load-cache`` do. Medians over
the questions. Reading again is the stock way: the full cache, text and question in one prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from answers import RETRIEVAL
from environment import save

from thinkkv import sdk
from thinkkv.sdk.evaluation.scoring import share_found
from thinkkv.sdk.evaluation.setting import parse_policy
from thinkkv.sdk.generate_text import Generated, generate_text
from thinkkv.sdk.saved_text import ask, read_text

PROMPTS = Path(sdk.__file__).parent / "prompts"
POLICIES = "full,full+cache_dtype=k8v5,retrieval-kv+cache_dtype=k8v5,matched-kv+cache_dtype=k8v5"
NEW = 24
Row = dict[str, Any]


def main() -> None:
    """Read, ask, write."""
    options = _options()
    model, tokenizer = sdk.load(options.model, dtype=options.dtype)
    text = (PROMPTS / "demo.txt").read_text(encoding="utf-8")
    questions = json.loads((PROMPTS / "demo_questions.json").read_text(encoding="utf-8"))
    if options.quick:
        text, questions = text[:1500], questions[:1]
    rows = [_saved(model, tokenizer, text, questions, name, options) for name in options.policies.split(",")]
    rows.append(_read_again(model, tokenizer, text, questions[: options.again]))
    for row in rows:
        print(json.dumps(row), flush=True)
    if options.out:
        save(options.out, {"questions": len(questions), "rows": rows})


def _saved(
    model: Any, tokenizer: Any, text: str, questions: list[dict[str, str]], name: str, options: argparse.Namespace
) -> Row:
    """One policy: the text is read, and every question asked from the file."""
    profile = sdk.HeadProfile.load(RETRIEVAL)
    policy = parse_policy(name)
    if policy.profile_score is not None:
        policy = profile.fix(policy)
    ratio = None if policy.name == "full" else options.ratio
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.safetensors")
        read = read_text(model, tokenizer, text, path, name=options.model, policy=policy, ratio=ratio)
        answers = [ask(model, tokenizer, one["question"], path, max_new_tokens=NEW) for one in questions]
    return {
        "policy": name,
        "ratio": ratio or 1.0,
        "prompt_tokens": read.prompt_tokens,
        "read_seconds": round(read.prefill_seconds, 3),
        "save_seconds": round(read.save_seconds, 3),
        "file_bytes": read.file_bytes,
        "used_bytes": read.bytes.used,
        "load_seconds": _median([answer.load_seconds or 0 for answer in answers]),
        **_answered(answers, questions),
    }


def _read_again(model: Any, tokenizer: Any, text: str, questions: list[dict[str, str]]) -> Row:
    """The stock way: text and question in one prompt."""
    prompts = (f"{text}\n\n{one['question']}" for one in questions)
    answers = [generate_text(model, tokenizer, prompt, policy="full", max_new_tokens=NEW) for prompt in prompts]
    return {"policy": "full, read again", "ratio": 1.0, **_answered(answers, questions)}


def _answered(answers: list[Generated], questions: list[dict[str, str]]) -> Row:
    first = [(answer.load_seconds or 0) + answer.prefill_seconds for answer in answers]
    right = [share_found([one["answer"]], answer.text) for answer, one in zip(answers, questions, strict=True)]
    return {"first_token_seconds": _median(first), "asked": len(questions), "right": int(sum(right))}


def _median(seconds: list[float]) -> float:
    return round(statistics.median(seconds), 3)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--ratio", type=float, default=0.15)
    parser.add_argument("--again", type=int, default=4, help="questions that are asked by reading the text again")
    parser.add_argument("--quick", action="store_true", help="a look: the beginning of the text, one question")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.policies, options.again = "full,snapkv", 1
    return options


if __name__ == "__main__":
    main()
