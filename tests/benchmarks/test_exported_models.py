"""What exported models say, beside PyTorch: the quick forms' rows."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_a_bundle_and_a_gguf_file_say_what_pytorch_says(run: Any) -> None:
    *bundle, gguf = run("export_equality", "rows.json")
    assert [row["native"] for row in bundle] == [False, False, True, True]
    for onnx, perplexity in (bundle[:2], bundle[2:]):
        assert onnx["equal_until"] == onnx["compared"] == 20
        assert perplexity["perplexity"] == pytest.approx(perplexity["perplexity_full_cache_float32"], rel=0.2)
    assert gguf["equal_text"]


def test_int4_costs_perplexity_and_saves_bytes(run: Any) -> None:
    full, int4 = run("int4_methods", "rows.json")
    assert int4["data_bytes"] < 0.2 * full["data_bytes"]
    assert full["perplexity"] < int4["perplexity"] < 2 * full["perplexity"]
