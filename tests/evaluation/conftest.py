"""A tiny model, and a tokenizer with one token per character that fits its vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sdk.conftest import char_tokenizer  # noqa: F401  (a fixture)
from tests.tiny_models import new_model


@pytest.fixture(scope="module")
def model() -> Any:
    return new_model("llama", 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, char_tokenizer: Any) -> Path:  # noqa: F811
    """The tiny model and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    new_model("llama", 2).save_pretrained(folder)
    char_tokenizer.save_pretrained(folder)
    return folder
