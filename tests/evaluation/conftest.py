"""A tiny model, and a tokenizer with one token per character that fits its vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sdk.conftest import char_tokenizer  # noqa: F401  (a fixture)
from tests.tiny_models import new_model


@pytest.fixture(scope="module")
def model() -> Any:
    return new_model("llama", 2)
