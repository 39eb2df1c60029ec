"""Loading models: from a checkpoint folder, or converted from a GGUF file.

No pickle is read, and no code that comes with a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkkv.patches.errors import MissingExtraError, ModelNotFoundError, ThinkKVError, UnsupportedModelError
from thinkkv.sdk.gguf_tokenizer import read_as_the_file_says
from thinkkv.sdk.model_sources import fetch, first_line, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEEP_CONVERTED_BELOW = 512 * 2**20
"""GGUF files up to this size are kept converted on disk, where they take up to eight times their size."""

CONVERSION = 2
"""Counted up whenever the same file is converted otherwise than before: what was kept then is not used."""

DTYPES = ("float32", "bfloat16", "float16")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: an alias, hub id, checkpoint folder or GGUF file.
        dtype: ``float32``, ``bfloat16``, ``float16`` or a torch dtype; by default the checkpoint's (GGUF: float32).
        device: where the model goes; the CPU by default.

    Returns:
        The model in evaluation mode, and the tokenizer.

    Raises:
        ModelNotFoundError: there is no such model, or it is incomplete or damaged.
        UnsupportedModelError: transformers has no causal language model for it.
        MissingExtraError: reading it needs a package that is not installed.
    """
    source = resolve(name)
    wanted = _torch_dtype(dtype)
    if source.kind == "gguf":
        model, tokenizer = _load_gguf(Path(source.location), source.label, wanted)
    else:
        model, tokenizer = _load_folder(fetch(source), source.label, wanted or "auto")
    model.eval()
    if device is not None:
        model.to(device)
    return model, tokenizer


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    import torch  # heavy: not for those who only resolve

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ThinkKVError(f"no dtype {dtype!r} - choose one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, dtype)
    return found


def _load_folder(folder: Path, label: str, dtype: torch.dtype | str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # heavy: not for those who only resolve

    # Said explicitly: left open, transformers asks on a terminal whether to run the checkpoint's code.
    local = {"trust_remote_code": False, "local_files_only": True}
    auto_model: Any = AutoModelForCausalLM  # typed as if it never returned the loading info
    try:
        model, loaded = auto_model.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **local
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except ImportError as error:
        raise MissingExtraError(f"{label} needs a missing package ({first_line(error)}) - install it") from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"{label} is no causal language model that transformers can load without running its code "
            f"({first_line(error)}) - `thinkkv doctor` lists what is supported"
        ) from error
    except Exception as error:  # damaged files end in many ways, SafetensorError is no OSError
        raise ModelNotFoundError(
            f"{label} cannot be loaded ({first_line(error)}) - check its files or copy the checkpoint again"
        ) from error
    _refuse_missing(loaded, label)
    return model, tokenizer


def _refuse_missing(loaded: Mapping[str, Any], label: str) -> None:
    """Weights that are not in the file would otherwise stay random, with only a warning."""
    if missing := sorted(loaded["missing_keys"]):
        raise ModelNotFoundError(
            f"{label} lacks {len(missing)} of its weights ({missing[0]}, ...) - get or copy the model again"
        )


def _load_gguf(path: Path, label: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """Load a GGUF file, or what is kept of converting it before.

    Reading even a small file takes transformers 15 s and more, most of it for the vocabulary: it is parsed three times.
    """
    import torch  # heavy: not for those who only resolve

    dtype = dtype or torch.float32
    if path.stat().st_size > KEEP_CONVERTED_BELOW:
        return _dequantize(path, label, dtype)
    kept = _kept_folder(path)
    if kept.is_dir():
        try:
            return _load_folder(kept, label, dtype)
        except ThinkKVError:
            shutil.rmtree(kept, ignore_errors=True)
    model, tokenizer = _dequantize(path, label, torch.float32)
    _keep(model, tokenizer, kept)
    if dtype == torch.float32:
        return model, tokenizer
    return _load_folder(kept, label, dtype) if kept.is_dir() else _dequantize(path, label, dtype)


def _dequantize(path: Path, label: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A GGUF file as a plain model that can be saved, and its tokenizer."""
    import transformers  # heavy: not for those who only resolve

    auto_model: Any = transformers.AutoModelForCausalLM  # typed as if it never returned the loading info
    options = {"gguf_file": path.name, "dtype": dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # without it, these releases mark the model as quantized: not to be saved
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        model, loaded = auto_model.from_pretrained(path.parent, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        read_as_the_file_says(tokenizer, path)
    except Exception as error:  # a cut-off file ends in whatever the parser runs into
        raise ModelNotFoundError(
            f"{label} cannot be read ({first_line(error)}) - it is damaged, cut off or of an architecture that "
            "transformers does not read from GGUF; get the file again, or name a checkpoint folder"
        ) from error
    _refuse_missing(loaded, label)
    return model, tokenizer


def _kept_folder(path: Path) -> Path:
    """Where the converted form of this very file is kept, by its path, size, time and the version that read it."""
    from transformers import __version__  # heavy: not for those who only resolve

    stat = path.stat()
    identity = f"{path}|{stat.st_size}|{stat.st_mtime_ns}|{__version__}|{CONVERSION}"
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "thinkkv", "gguf", f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")


def _keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save the converted model, whole or not at all; a full or read-only disk only costs time later."""
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    except Exception:  # the disk's OSError, or safetensors' own
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
