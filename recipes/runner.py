"""Running a recipe: its stages in order, each evaluated before and after, resumed where a run was killed.

The run folder holds ``resolved.yaml``, ``metrics.jsonl``, ``eval.json``, ``completions.jsonl``, ``curves.png``,
``README.md``, ``adapter/``, perhaps ``merged/``, and a folder per stage. A finished stage says so in ``done.json``
with the hash of everything that decides its result; a stage of another hash is started over.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from thinkkv.patches.errors import ThinkKVError
from thinkkv.recipes.checkpoints import drop_checkpoints
from thinkkv.recipes.config import Recipe
from thinkkv.recipes.curves import draw_curves
from thinkkv.recipes.evaluation import Evaluation, Response, evaluate
from thinkkv.recipes.metrics import MetricsLog
from thinkkv.recipes.model_card import model_card
from thinkkv.recipes.problems import load_problems
from thinkkv.recipes.processes import Processes
from thinkkv.recipes.rewards import build_reward
from thinkkv.recipes.stages import Trained, Work, run_stage
from thinkkv.recipes.trainer_arguments import check_arguments
from thinkkv.recipes.weights import Weights, load_tokenizer, open_model
from thinkkv.sdk.files import write_whole

FREE_BYTES = 256 * 2**20
"""Free space below which no run starts, besides what its weights need."""

FULL_BYTES = 2**20
"""Free space below which a failure is the full disk's."""


class Reporter(Protocol):
    """Who is told how a run goes."""

    def stage(self, index: int, total: int, kind: str, skipped: bool) -> None:
        """A stage begins, or was finished before."""

    def step(self, step: int, total: int, values: dict[str, Any]) -> None:
        """A step was logged."""

    def evaluated(self, when: str, found: Evaluation) -> None:
        """The model was evaluated."""

    def note(self, text: str) -> None:
        """Something worth a line."""


def run(recipe: Recipe, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Run a recipe in a folder that exists.

    Args:
        recipe: what to do; ``resume: never`` starts over.
        folder: the run folder.
        reporter: is told.

    Returns:
        The result, as the command prints it.

    Raises:
        ThinkKVError: what cannot be done, with what to do.
    """
    try:
        return _run(recipe, folder, reporter)
    except Exception as error:
        if _disk_is_full(error, folder):
            raise ThinkKVError(f"the disk of {folder} is full - free some space; the same command goes on") from error
        raise


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """Whether a write failed for want of space; torch and safetensors say so with errors of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return shutil.disk_usage(folder).free < FULL_BYTES and not isinstance(error, ThinkKVError)


def _run(recipe: Recipe, folder: Path, reporter: Reporter) -> dict[str, Any]:
    start, group = time.monotonic(), Processes.current()
    if group.main:
        _begin(recipe, folder)
    for reward in recipe.reward:
        build_reward(reward, recipe.steps)  # a wrong name must fail before hours of work
    tokenizer = load_tokenizer(recipe)
    work = Work(
        recipe,
        folder,
        tokenizer,
        load_problems(recipe.data, tokenizer, recipe.seed),
        MetricsLog(folder / "metrics.jsonl"),
        group,
        reporter.step,
        reporter.note,
    )
    check_arguments(recipe, work.problems)
    group.wait()
    before = _initial(work, reporter)
    weights, results = Weights(), []
    for index, stage in enumerate(recipe.stages):
        done = _finished(work, index)
        reporter.stage(index, len(recipe.stages), stage.kind, done is not None)
        if done is None:
            done = _stage(work, index, weights, before, reporter)
        weights, before = Weights(**done["weights"]), Evaluation(**done["after"])
        results.append(done["result"])
        if group.main:
            _write_reports(work, results)
    result = _deliver(work, weights, results) if group.main else {}
    group.wait()
    return {**result, "seconds": round(time.monotonic() - start, 1)}


def _begin(recipe: Recipe, folder: Path) -> None:
    """Write down what will run, which shows before any work that the folder can be written to."""
    try:
        write_whole(folder / "resolved.yaml", recipe.dump().encode())
        if recipe.resume == "never":
            _clear(folder)
    except OSError as error:
        if _disk_is_full(error, folder):
            raise
        raise ThinkKVError(f"cannot write to {folder} ({error.strerror}) - choose another folder with --out") from error


def _clear(folder: Path) -> None:
    """Forget an earlier run, and nothing that is not a run's."""
    for name in ("stages", "adapter", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "eval.json", "completions.jsonl", "curves.png", "README.md", "initial.json"):
        (folder / name).unlink(missing_ok=True)


def _initial(work: Work, reporter: Reporter) -> Evaluation:
    """The untrained model, evaluated once per run."""
    path = work.folder / "initial.json"
    key = work.recipe.stage_hash(-1)
    known = _read(path)
    if known and known["hash"] == key:
        return Evaluation(**known["evaluation"])
    # With its adapter, which changes nothing yet: one that does not fit the model must fail now.
    model = open_model(work.recipe, Weights(), trainable=True).eval()
    _check_space(work, model)
    found, _ = evaluate(
        model, work.tokenizer, work.problems, work.recipe, rank=work.processes.rank, world=work.processes.world
    )
    if work.processes.main:
        _write(path, {"hash": key, "evaluation": found.as_dict()})
    reporter.evaluated("at the start", found)
    return found


def _check_space(work: Work, model: Any) -> None:
    """Refuse to start what cannot be saved."""
    needed, free = space_needed(work.recipe, model), shutil.disk_usage(work.folder).free
    if free < needed:
        raise ThinkKVError(
            f"{work.folder} has {free / 2**30:.1f} GiB free and the run needs about {needed / 2**30:.1f} - "
            "free some space, or choose another folder with --out"
        )


def space_needed(recipe: Recipe, model: Any) -> int:
    """Bytes that a run leaves on disk at its worst moment.

    Three checkpoints of what is trained, each with Adam's two moments (two are kept, and the oldest goes when the next
    is whole), every stage's weights, the result's copy, the merged model if asked, and ``FREE_BYTES``.

    Args:
        recipe: what runs.
        model: with its adapter, if it gets one.
    """
    full = any(getattr(stage, "tune", None) == "full" for stage in recipe.stages)
    sizes = [(item.numel() * item.element_size(), full or item.requires_grad) for item in model.parameters()]
    trained = sum(size for size, trains in sizes if trains)
    merged = sum(size for size, _ in sizes) if recipe.output.merge else 0
    return FREE_BYTES + trained * (3 * 3 + len(recipe.stages) + 1) + merged


def _finished(work: Work, index: int) -> dict[str, Any] | None:
    """What a stage left, if it was finished under the same settings."""
    done = _read(work.stage_folder(index) / "done.json")
    return done if done and done["hash"] == work.recipe.stage_hash(index) else None


def _stage(work: Work, index: int, weights: Weights, before: Evaluation, reporter: Reporter) -> dict[str, Any]:
    """Train and evaluate one stage."""
    folder, key, main = work.stage_folder(index), work.recipe.stage_hash(index), work.processes.main
    started = _read(folder / "stage.json")
    if main and (not started or started["hash"] != key):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        work.log.rewind(index, -1)
        _write(folder / "stage.json", {"hash": key})
    work.processes.wait()
    trained = _train(work, index, weights)
    found, responses = before, None
    if trained.weights != weights:
        model = open_model(work.recipe, trained.weights).eval()
        found, responses = evaluate(
            model, work.tokenizer, work.problems, work.recipe, rank=work.processes.rank, world=work.processes.world
        )
        reporter.evaluated("after the stage", found)
    done = {
        "hash": key,
        "weights": asdict(trained.weights),
        "after": found.as_dict(),
        "result": _result(work, index, trained, before, found),
    }
    if main:
        if responses is not None:
            write_whole(work.folder / "completions.jsonl", _lines(responses))
        _write(folder / "done.json", done)
        drop_checkpoints(folder)
    work.processes.wait()
    return done


def _train(work: Work, index: int, weights: Weights) -> Trained:
    """Run a stage, unless only its evaluation is left to do."""
    path = work.stage_folder(index) / "trained.json"
    known = _read(path)
    if known:
        return Trained(known["steps"], Weights(**known["weights"]), known["facts"])
    trained = run_stage(work, index, weights)
    if work.processes.main:
        _write(path, asdict(trained))
    work.processes.wait()
    return trained


def _result(work: Work, index: int, trained: Trained, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    pairs = {
        key: {"before": getattr(before, key), "after": getattr(after, key)}
        for key in ("accuracy", "mean_tokens", "critical_share", "estimated_critical_share", "importance_auc", "ci95")
    }
    return {"kind": work.recipe.stages[index].kind, "steps": trained.steps, **pairs, **trained.facts}


def _write_reports(work: Work, results: list[dict[str, Any]]) -> None:
    """What a reader looks at, brought up to date after every stage."""
    _write(work.folder / "eval.json", {"stages": results, "responses": work.recipe.data.eval_rows})
    draw_curves(work.folder / "curves.png", work.log.rows(), results)
    merged = "merged" if work.recipe.output.merge else None
    write_whole(work.folder / "README.md", model_card(work.recipe, results, merged).encode())


def _deliver(work: Work, weights: Weights, results: list[dict[str, Any]]) -> dict[str, Any]:
    """The adapter, or the whole model where there is none, and the merged checkpoint if asked."""
    final = weights.adapter or weights.base
    adapter = work.folder / "adapter" if weights.adapter else None
    merged = None
    if adapter and final:
        shutil.copytree(final, adapter, dirs_exist_ok=True)
    if work.recipe.output.merge and final:
        merged = work.folder / "merged"
        model = open_model(work.recipe, weights)
        model = model.merge_and_unload() if weights.adapter else model
        model.save_pretrained(merged)
        work.tokenizer.save_pretrained(merged)
    return {
        "model": weights.base or work.recipe.model.name,
        "recipe": work.recipe.name,
        "stages": results,
        "adapter": str(adapter) if adapter else None,
        "merged": str(merged) if merged else None,
        "out": str(work.folder),
    }


def _lines(responses: list[Response]) -> bytes:
    return "".join(json.dumps(asdict(response), ensure_ascii=False) + "\n" for response in responses).encode()


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(values, indent=1) + "\n").encode())
