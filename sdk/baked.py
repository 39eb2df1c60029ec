"""Loading models as users do: an exported checkpoint comes back patched, as it was baked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thinkkv.patches.errors import PatchStateError
from thinkkv.sdk import manifest, model_sources, models
from thinkkv.sdk.block import BLOCK_FILE, Block

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from thinkkv.sdk.patching import PatchHandle


@dataclass(frozen=True)
class BakedOptions:
    """How an exported checkpoint is patched unless the caller says otherwise.

    Args:
        policy, ratio, budget: as baked.
        profile: the checkpoint's folder, where it has a profile.
    """

    policy: str
    ratio: float | None
    budget: int | None
    profile: Path | None


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
        BundleError: an exported checkpoint is not what its manifest says, or newer than this thinkkv.
    """
    options = baked_options(name)
    model, tokenizer = models.load(name, dtype=dtype, device=device)
    if options is not None:
        from thinkkv.sdk.patching import apply  # loads torch, which finding out that a name is wrong does not need

        apply(model, **vars(options))
    return model, tokenizer


def baked_options(name: str | os.PathLike[str]) -> BakedOptions | None:
    """What an exported checkpoint was baked with; None for other models. Nothing of it is loaded.

    Raises:
        BundleError: it is not what its manifest says, or newer than this thinkkv.
    """
    folder = Path(name).expanduser()
    if os.fspath(name) in model_sources.ALIASES or not (folder / BLOCK_FILE).is_file():
        return None
    if (folder / manifest.MANIFEST_FILE).is_file():
        manifest.verify(folder)
    block = Block.read(folder)
    profile = folder if block.calibration is not None else None
    return BakedOptions(block.policy, block.ratio, block.budget, profile)


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
