"""Reading the problems of a recipe from a task, a generator, a file or a data set of the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thinkkv.patches.errors import RecipeError, ThinkKVError
from thinkkv.recipes.config import DataConfig
from thinkkv.recipes.tasks import gym_traces, running_value
from thinkkv.sdk.extras import require

Row = dict[str, Any]


@dataclass(frozen=True)
class Problems:
    """The problems of a recipe, prompts rendered as the model sees them.

    Args:
        train: rows with ``prompt``, ``answer``, perhaps ``completion``, and whatever else the source has.
        held_out: rows for the evaluation.
        weigh: true weight of a step's text, where the task knows it.
    """

    train: list[Row]
    held_out: list[Row]
    weigh: Callable[[str], float] | None = None


def load_problems(config: DataConfig, tokenizer: Any, seed: int) -> Problems:
    """Read, split and render.

    Args:
        config: the recipe's ``data``.
        tokenizer: its chat template renders the prompts, if it has one.
        seed: of generated problems.
    """
    kind, _, name = config.source.partition(":")
    if kind == "task":
        return _kept_apart(*_task(name, config, seed))
    rows = _gym(name, config, seed) if kind == "gym" else _read(config)
    if len(rows) <= config.eval_rows:
        raise RecipeError(
            f"{config.source} has {len(rows)} rows and data.eval_rows is {config.eval_rows} - lower eval_rows"
        )
    rendered = [row | {"prompt": render(row["prompt"], config, tokenizer)} for row in rows]
    # The first rows are held out: the choice hangs on nothing that a resumed run could draw differently.
    return _kept_apart(rendered[config.eval_rows :][: config.rows], rendered[: config.eval_rows])


def _kept_apart(train: list[Row], held_out: list[Row], weigh: Callable[[str], float] | None = None) -> Problems:
    """Held-out problems that come up again are not trained on."""
    held = {row["prompt"] for row in held_out}
    return Problems([row for row in train if row["prompt"] not in held], held_out, weigh)


def render(prompt: str, config: DataConfig, tokenizer: Any) -> str:
    """The text of a prompt as the model sees it, without the beginning token that the tokenizer adds again."""
    text = config.template.replace("{prompt}", prompt)
    if getattr(tokenizer, "chat_template", None) is None:
        return f"{config.system}\n\n{text}" if config.system else text
    messages = [{"role": "system", "content": config.system}] if config.system else []
    messages.append({"role": "user", "content": text})
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return rendered.removeprefix(tokenizer.bos_token or "")


def _task(name: str, config: DataConfig, seed: int) -> tuple[list[Row], list[Row], Callable[[str], float]]:
    if name != "running-value":
        raise RecipeError(f"no task {name!r} - choose task:running-value")
    lengths, style = running_value.options(config.options)
    train = running_value.rows(_count(config), seed, style, lengths)
    # Held-out problems are the same for every seed, so that runs can be compared.
    held_out = running_value.rows(config.eval_rows, -1, lengths=lengths)

    def weigh(step: str) -> float:
        return float(running_value.step_kind(step) in running_value.CRITICAL)

    return train, held_out, weigh


def _gym(names: str, config: DataConfig, seed: int) -> list[Row]:
    """Problems of reasoning-gym, several generators in turn; their metadata go along for the verifier."""
    require(("reasoning_gym",), extra="gym", purpose="this recipe")
    import reasoning_gym

    chosen = [name.strip() for name in names.split(",") if name.strip()]
    total = _count(config) + config.eval_rows
    share = -(-total // len(chosen))
    try:
        sets = [
            reasoning_gym.create_dataset(name, size=share, seed=seed, **config.options.get(name, {})) for name in chosen
        ]
    except ValueError as error:
        raise RecipeError(f"data.source: {error} - see reasoning-gym's list of data sets") from None
    rng = random.Random(seed)
    rows = [_gym_row(name, data[index], rng) for index in range(share) for name, data in zip(chosen, sets, strict=True)]
    return rows[:total]


def _gym_row(name: str, entry: dict[str, Any], rng: random.Random) -> Row:
    row = {"prompt": entry["question"], "answer": str(entry["answer"]), "gym": name, "entry": json.dumps(entry)}
    tracer = gym_traces.TRACERS.get(name)
    return row | {"completion": tracer(entry, rng)} if tracer else row


def _read(config: DataConfig) -> list[Row]:
    """A jsonl or parquet file, or a data set of the hub, with its columns renamed."""
    path = Path(config.source).expanduser()
    rows: list[Mapping[str, Any]]
    theirs = {"prompt": "prompt", "answer": "answer", **config.columns}
    rows = list(_json_lines(path) if path.suffix == ".jsonl" else _data_set(path, config, theirs.values()))
    for number, row in enumerate(rows, 1):
        _check_columns(f"{config.source}, row {number}", theirs.values(), row)
    return [{**row, **{ours: row[column] for ours, column in theirs.items()}} for row in rows]


def _data_set(path: Path, config: DataConfig, columns: Collection[str]) -> Any:
    """A parquet file or a data set of the hub, whose columns are checked before anything large is fetched."""
    from datasets import Dataset, load_dataset, load_dataset_builder  # heavy: only data sets need it

    try:
        if path.suffix == ".parquet":
            return Dataset.from_parquet(str(path))
        features = load_dataset_builder(config.source).info.features
        if features is not None:  # not every data set declares them
            _check_columns(config.source, columns, features)
        return load_dataset(config.source, split=config.split)
    except RecipeError:
        raise
    except Exception as error:  # whatever the file, the network or the hub came up with
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ThinkKVError(
            f"cannot load data {config.source} ({reason}) - check the path or name, and the network"
        ) from error


def _check_columns(place: str, columns: Collection[str], known: Collection[str]) -> None:
    """Refuse a mapping of columns that are not there."""
    for column in columns:
        if column not in known:
            raise RecipeError(f"{place}: no column {column} but {', '.join(known)} - map it with data.columns")


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ThinkKVError(f"cannot read {path} ({error.strerror}) - check data.source") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ThinkKVError(f"{path} line {number} is no JSON object - write one per line")
        yield row


def _count(config: DataConfig) -> int:
    if not config.rows:
        raise RecipeError(f"{config.source} is generated without end - set data.rows")
    return config.rows
