"""lm-evaluation-harness runs a patched model on a task file of one's own, without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'thinkkv[harness]'")

TASK = """
task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: 4, do_sample: false, until: ["@"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task and its two samples, of different length."""
    samples = [{"text": "a story of an iron bridge " * 20, "answer": "x"}, {"text": "a short one " * 12, "answer": "y"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (tmp_path / "echo.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path


def test_the_harness_generates_with_a_compressed_cache(
    checkpoint: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(task / "cache"))
    from thinkkv.sdk.evaluation.harness import PatchedModel

    model = PatchedModel(str(checkpoint), policy="snapkv", ratio=0.5, batch_size=2, device="cpu", max_length=1000)
    model.tokenizer.eos_token = "."
    found: Any = lm_eval.simple_evaluate(
        model, tasks=["echo"], task_manager=lm_eval.tasks.TaskManager(include_path=str(task), include_defaults=False)
    )
    assert len(found["samples"]["echo"]) == 2
    held = model.handle.report()
    assert held.policy == "snapkv"
    assert held.bytes.used < 0.7 * held.bytes.full
