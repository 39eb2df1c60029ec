"""Write a baked model as a stock Hugging Face checkpoint that ``sdk.load`` gives back patched."""

from __future__ import annotations

from pathlib import Path

from thinkkv.export.bake import Baked
from thinkkv.export.staging import write_json
from thinkkv.sdk.block import BLOCK_FILE

CONFIG_KEY = "thinkkv"


def write_checkpoint(baked: Baked, folder: Path) -> None:
    """Weights, tokenizer, ``thinkkv`` in ``config.json``, ``thinkkv.json``, and the profile.

    Args:
        baked: what ``bake`` returned.
        folder: an existing folder.
    """
    config = baked.model.config
    setattr(config, CONFIG_KEY, baked.block.as_json())
    try:
        baked.model.save_pretrained(folder)
    finally:
        delattr(config, CONFIG_KEY)
    baked.tokenizer.save_pretrained(folder)
    write_json(folder / BLOCK_FILE, baked.block.as_json())
    if baked.profile is not None:
        baked.profile.save(folder)
