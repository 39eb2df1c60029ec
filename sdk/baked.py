"""Loading models as users do: an exported checkpoint comes back patched, as it was baked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkkv.patches.errors import PatchStateError, ProfileMismatchError
from thinkkv.sdk import model_sources, models

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thinkkv.sdk.patching import PatchHandle

BLOCK_FILE = "thinkkv.json"


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; a checkpoint that ``thinkkv export`` wrote is patched with its profile.

    Args:
        name: an alias, hub id, checkpoint folder or GGUF file.
        dtype: ``float32``, ``bfloat16``, ``float16`` or a torch dtype; by default the checkpoint's (GGUF: float32).
        device: where the model goes; the CPU by default.

    Returns:
        The model in evaluation mode, and the tokenizer. ``sdk.handle_of(model)`` reports on a patched one and reverts.

    Raises:
        ModelNotFoundError: there is no such model, or it is incomplete or damaged.
        UnsupportedModelError: transformers has no causal language model for it.
        MissingExtraError: reading it needs a package that is not installed.
        ProfileMismatchError: an exported checkpoint's profile is damaged or not its own.
    """
    model, tokenizer = models.load(name, dtype=dtype, device=device)
    folder = Path(name).expanduser()
    if (folder / BLOCK_FILE).is_file() and os.fspath(name) not in model_sources.ALIASES:
        _patch(model, folder)
    return model, tokenizer


def handle_of(model: Any) -> PatchHandle:
    """The handle of a patched model, as ``apply`` returned it.

    Raises:
        PatchStateError: the model is not patched.
    """
    from thinkkv.sdk.patching import HANDLE  # loads torch, which a wrong name for a model does not need

    if HANDLE not in vars(model):
        raise PatchStateError("the model is not patched - call sdk.apply(model) first")
    handle: PatchHandle = vars(model)[HANDLE]
    return handle


def _patch(model: Any, folder: Path) -> None:
    from thinkkv.sdk.patching import apply  # loads torch, which finding out that a name is wrong does not need

    path = folder / BLOCK_FILE
    try:
        block = json.loads(path.read_text(encoding="utf-8"))
        policy, ratio, budget = block["policy"], block["ratio"], block["budget"]
        profile = folder if block["calibration"] is not None else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProfileMismatchError(f"{path} is damaged ({error}) - export again") from error
    apply(model, policy=policy, ratio=ratio, budget=budget, profile=profile)
