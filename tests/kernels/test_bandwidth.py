"""The bandwidth model against numbers computed by hand and against what the kernels allocate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thinkkv.kernels import bandwidth
from thinkkv.kernels.bandwidth import Traffic
from thinkkv.kernels.chips import A100, H100
from thinkkv.kernels.semantic_vector import triton as semantic_vector
from thinkkv.kernels.window_scores import triton as window_scores

ROOT = Path(__file__).parents[2]


def test_window_scores_by_hand() -> None:
    # 3 tiles of 128. Keys 2 x 257 x 64 x 2 = 65,792 and queries 6 x 32 x 64 x 2 = 24,576, twice; partials
    # 4 x 6 x 3 x 32 = 2,304; sums 4 x 6 x 32 = 768; scores 4 x 6 x 257 = 6,168.
    found = bandwidth.window_scores(kv_heads=2, group=3, tokens=257, dim=64, itemsize=2)
    assert found == Traffic(read=180_736 + 2_304 + 768, written=2_304 + 768 + 6_168, launches=3)


def test_semantic_vector_by_hand() -> None:
    # D 80 takes lanes for 128: 64 rows of 16 KiB, 4 programs. Weights 4 x 6 x 300 = 7,200; chosen ones and positions
    # 12 x 6 x 256 = 18,432; values 6 x 256 x 80 x 2 = 245,760; partials 4 x 6 x 4 x 80 = 7,680; vectors 1,920.
    found = bandwidth.semantic_vector(heads=6, tokens=300, dim=80, itemsize=2)
    assert found == Traffic(read=7_200 + 18_432 + 245_760 + 7_680, written=18_432 + 7_680 + 1_920, launches=1)


def test_compact_by_hand() -> None:
    # Rows 2 x 8 x 64 x 4 = 4,096; 8 positions, 3 starts, 2 offsets of 8 bytes.
    assert bandwidth.compact(kept=[3, 5], dim=64, itemsize=4) == Traffic(read=4_096 + 104, written=4_096, launches=1)


def test_append_by_hand() -> None:
    # Rows 2 x 2 x 3 x 64 x 2 = 1,536; 2 offsets of 8 bytes, 2 lengths of 4 bytes read and written.
    found = bandwidth.append(rows=2, new=3, dim=64, itemsize=2)
    assert found == Traffic(read=1_536 + 24, written=1_536 + 8, launches=1)


def test_ragged_decode_by_hand() -> None:
    # K and V 2 x 514 x 64 x 2 = 131,584; queries and output 512 each; 1 + 2 splits of 2 heads x 66 floats = 1,584.
    found = bandwidth.ragged_decode(lengths=[1, 513], group=2, dim=64, itemsize=2, split=512)
    assert found == Traffic(read=131_584 + 512 + 24 + 1_584, written=1_584 + 512, launches=2)


def test_a_decoded_token_takes_three_launches_a_layer() -> None:
    lengths = [[700, 20], [300, 300], [1, 1]]
    found = bandwidth.decoded_token(lengths=lengths, group=4, dim=128, itemsize=2)
    assert found.launches == 3 * 3
    cache = 2 * (720 + 600 + 2) * 128 * 2
    # Beyond the cache: 6 tokens of K and V read and written, 6 x 4 queries read and outputs written, 7 splits of
    # 4 x 130 floats written and read, 2 x 6 x 12 + 6 x 4 bytes of offsets and lengths.
    assert found.moved == cache + 2 * 2 * 6 * 128 * 2 + 2 * 24 * 128 * 2 + 2 * 7 * 4 * 130 * 4 + 168


def test_work_after_a_prefill_is_the_sum_of_its_operations() -> None:
    shape = {"dim": 64, "itemsize": 2}
    found = bandwidth.prompt_work(lengths=[[90, 30]] * 2, tokens=200, group=3, **shape)
    scores = bandwidth.window_scores(kv_heads=2, group=3, tokens=200, **shape)
    vectors = bandwidth.semantic_vector(heads=6, tokens=200, **shape)
    compaction = bandwidth.compact(kept=[90, 30], **shape)
    assert found.moved == 2 * (scores.moved + vectors.moved + compaction.moved)
    assert found.launches == 2 * 5


@pytest.mark.parametrize(("chip", "peak"), [(A100, 2039e9), (H100, 3350e9)], ids=lambda value: str(value)[:9])
def test_estimates_are_at_80_percent_of_the_published_bandwidth(chip: bandwidth.Chip, peak: float) -> None:
    assert Traffic(int(peak), int(peak), 1).estimated_seconds(chip) == pytest.approx(2.5)


def test_a_quarter_of_the_cache_is_a_quarter_of_the_traffic() -> None:
    model = bandwidth.MODELS[0]
    full, quarter = (
        bandwidth.decoded_token(lengths=model.lengths(32768, ratio), group=4, dim=128, itemsize=2).moved
        for ratio in (1.0, 0.25)
    )
    assert full == pytest.approx(32 * 8 * 32768 * 2 * 128 * 2, rel=0.02)  # the cache itself
    assert quarter / full == pytest.approx(0.25, rel=0.001)


def allocated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What torch.empty gives from now on."""
    found: list[torch.Tensor] = []
    allocate = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **options: found.append(allocate(*shape, **options)) or found[-1]
    )
    return found


@pytest.mark.parametrize("dim", [64, 256])
def test_window_scores_write_what_is_modelled(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys = torch.randn(6, 32, dim).half(), torch.randn(2, 200, dim).half()
    tensors = allocated(monkeypatch)
    window_scores.window_scores(queries, keys, scale=0.1)
    tile = window_scores.Tiling.of(dim, 2).keys
    found = bandwidth.window_scores(kv_heads=2, group=3, tokens=200, dim=dim, itemsize=2, tile=tile)
    assert found.written == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("dim", [80, 256])
def test_semantic_vector_write_what_is_modelled(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, values = torch.rand(4, 150), torch.randn(2, 150, dim).half()
    tensors = allocated(monkeypatch)
    out = semantic_vector.semantic_vector(weights, values, top=100)
    chosen = 4 * 100 * (4 + 8)
    found = bandwidth.semantic_vector(heads=4, tokens=150, dim=dim, itemsize=2, top=100)
    assert found.written == sum(tensor.nbytes for tensor in tensors) + chosen + out.nbytes


def test_the_documented_tables_are_the_models() -> None:
    assert bandwidth.markdown() in (ROOT / "docs" / "kernels.md").read_text()


def test_the_command_prints_estimates_without_torch() -> None:
    code = "import sys; from thinkkv.kernels.bandwidth import main; main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "estimates, nothing was run on a GPU" in done.stdout
