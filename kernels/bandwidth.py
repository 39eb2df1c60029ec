"""Bytes that the operations must move, and the time that memory alone would take: estimates, nothing here is measured.

    python -m thinkkv.kernels.bandwidth

Every operation's formula stands in its function. An estimate is bytes / (80 % of the chip's published bandwidth); it
knows no launch overhead, no arithmetic and no cache misses beyond the formula. Lengths and counts are in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from thinkkv.kernels.chips import A100, H100, Chip

REACHED = 0.8
"""Share of the published bandwidth that well-made streaming kernels reach."""

FLOAT, INT, LONG = 4, 4, 8
"""Bytes of float32, int32 and int64."""


@dataclass(frozen=True)
class Traffic:
    """What an operation moves.

    Args:
        read, written: bytes.
        launches: kernels of this project; torch's own (topk, sum) are not counted.
    """

    read: int
    written: int
    launches: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def estimated_seconds(self, chip: Chip) -> float:
        """Time to move the bytes at 80 % of the published bandwidth."""
        return self.moved / (REACHED * chip.bandwidth)

    def __add__(self, other: Traffic) -> Traffic:
        """One after the other."""
        return Traffic(self.read + other.read, self.written + other.written, self.launches + other.launches)


def total(parts: Iterable[Traffic]) -> Traffic:
    """All of them, one after the other."""
    return sum(parts, Traffic(0, 0, 0))


def window_scores(
    *, kv_heads: int, group: int, tokens: int, dim: int, itemsize: int, window: int = 32, tile: int = 128
) -> Traffic:
    """Two passes over the keys of one layer and a merge between them.

    read    2 n N D e + 2 n G L D e + 4 n G T L + 4 n G L    keys and queries twice, partials, sums
    written 4 n G T L + 4 n G L + 4 n G N                    partials, sums, scores

    with T = ceil(N / tile). Every tile reads the queries again, but from cache; they count once per pass.

    Args:
        kv_heads, group: n KV heads with G query heads each.
        tokens: N, prompt tokens.
        dim: D.
        itemsize: e, bytes per element of keys and queries.
        window: L, queries of the window.
        tile: keys of a program.
    """
    heads = kv_heads * group
    partials = FLOAT * heads * ceil(tokens / tile) * window
    sums = FLOAT * heads * window
    return Traffic(
        read=2 * (kv_heads * tokens + heads * window) * dim * itemsize + partials + sums,
        written=partials + sums + FLOAT * heads * tokens,
        launches=3,
    )


def semantic_vector(
    *, heads: int, tokens: int, dim: int, itemsize: int, top: int = 256, tile_bytes: int = 16384
) -> Traffic:
    """One layer's topk by torch, one gathering kernel and torch's sum over S = ceil(t / BLOCK_T) partial sums.

    read    4 H N + 12 H t + H t D e + 4 H S D    weights (by topk), chosen weights and positions, values, partials
    written 12 H t + 4 H S D + 4 H D              chosen weights and positions, partials, vectors

    Args:
        heads: H, query heads.
        tokens: N.
        dim: D.
        itemsize: e, bytes per element of the values.
        top: t, tokens chosen.
        tile_bytes: bytes of values of a program.
    """
    top = min(top, tokens)
    block = max(16, tile_bytes // ((1 << (dim - 1).bit_length()) * itemsize))
    chosen = (FLOAT + LONG) * heads * top
    partials = FLOAT * heads * ceil(top / block) * dim
    return Traffic(
        read=FLOAT * heads * tokens + chosen + heads * top * dim * itemsize + partials,
        written=chosen + partials + FLOAT * heads * dim,
        launches=1,
    )


def compact(*, kept: Sequence[int], dim: int, itemsize: int) -> Traffic:
    """Kept keys and values of all rows of a layer, gathered into the arena.

    read    2 K D e + 8 K + 8 (R + 1) + 8 R    rows of K and V, their positions, starts, offsets
    written 2 K D e

    Args:
        kept: tokens that each of the R rows keeps; K is their sum.
        dim: D.
        itemsize: e, bytes per element.
    """
    rows = 2 * sum(kept) * dim * itemsize
    return Traffic(read=rows + LONG * (sum(kept) + 2 * len(kept) + 1), written=rows, launches=1)


def append(*, rows: int, dim: int, itemsize: int, new: int = 1) -> Traffic:
    """New keys and values of all rows of a layer, written to the rows' ends.

    read    2 R Q D e + 8 R + 4 R    K and V, offsets, lengths
    written 2 R Q D e + 4 R          K and V, lengths

    Args:
        rows: R, (sequence, KV head) pairs.
        dim: D.
        itemsize: e, bytes per element.
        new: Q, tokens per row.
    """
    tokens = 2 * rows * new * dim * itemsize
    return Traffic(read=tokens + (LONG + INT) * rows, written=tokens + INT * rows, launches=1)


def ragged_decode(
    *, lengths: Sequence[int], group: int, dim: int, itemsize: int, new: int = 1, split: int = 512
) -> Traffic:
    """Attention of the newest tokens over rows of different length: splits, then their merge.

    read    2 T D e + R G Q D e + 12 R + 4 P (D + 2)    K and V, queries, offsets and lengths, partials
    written 4 P (D + 2) + R G Q D e                     partials (sum of values, maximum, sum), output

    with T = sum of the lengths and P = G Q * sum of ceil(length / split).

    Args:
        lengths: tokens of each of the R rows, the new ones among them.
        group: G, query heads per row.
        dim: D.
        itemsize: e, bytes per element.
        new: Q, queries per row and query head.
        split: tokens of one program.
    """
    queries = len(lengths) * group * new * dim * itemsize
    partials = FLOAT * group * new * sum(ceil(length / split) for length in lengths) * (dim + 2)
    return Traffic(
        read=2 * sum(lengths) * dim * itemsize + queries + (LONG + INT) * len(lengths) + partials,
        written=partials + queries,
        launches=2,
    )


def decoded_token(*, lengths: Sequence[Sequence[int]], group: int, dim: int, itemsize: int) -> Traffic:
    """Attention of one decoded token in a whole patched model: append, splits and merge in every layer.

    Projections, norms and feed-forward layers are not part of it.

    Args:
        lengths: per layer the tokens of each row, the new one among them.
        group: query heads per row.
        dim: D.
        itemsize: bytes per element of the cache.
    """
    return total(
        append(rows=len(rows), dim=dim, itemsize=itemsize)
        + ragged_decode(lengths=rows, group=group, dim=dim, itemsize=itemsize)
        for rows in lengths
    )


def prompt_work(*, lengths: Sequence[Sequence[int]], tokens: int, group: int, dim: int, itemsize: int) -> Traffic:
    """What the end of a prefill costs a whole model: window scores, semantic vectors and compaction in every layer.

    Args:
        lengths: per layer the tokens that each row keeps.
        tokens: prompt tokens.
        group: query heads per row.
        dim: D.
        itemsize: bytes per element.
    """
    return total(
        window_scores(kv_heads=len(rows), group=group, tokens=tokens, dim=dim, itemsize=itemsize)
        + semantic_vector(heads=len(rows) * group, tokens=tokens, dim=dim, itemsize=itemsize)
        + compact(kept=rows, dim=dim, itemsize=itemsize)
        for rows in lengths
    )


@dataclass(frozen=True)
class Model:
    """The part of a model's shape that attention depends on."""

    name: str
    layers: int
    kv_heads: int
    group: int
    dim: int

    def lengths(self, tokens: int, ratio: float) -> list[list[int]]:
        """Rows of one sequence that share ``ratio`` of the full cache evenly.

        Uneven rows of the same sum move the same bytes, but for the partial results of a few more splits.
        """
        return [[round(ratio * tokens)] * self.kv_heads] * self.layers


MODELS = (
    Model("Llama-3.1-8B", layers=32, kv_heads=8, group=4, dim=128),
    Model("SmolLM2-135M", layers=30, kv_heads=3, group=3, dim=64),
    Model("SmolLM2-1.7B", layers=24, kv_heads=32, group=1, dim=64),
)
CONTEXTS = (8192, 32768, 131072)
RATIOS = (1.0, 0.25)
ITEMSIZE = 2
"""Bytes per element in fp16 and bf16."""


def tables() -> dict[str, list[list[str]]]:
    """By title the tables of docs/kernels.md; the first row is the header."""
    header = ["model", "context", "ratio", "moved, GiB", "launches"]
    header += [f"{chip.name}, estimated ms" for chip in (A100, H100)]
    decode, prompt = [header], [header]
    for model in MODELS:
        for context in CONTEXTS:
            for ratio in RATIOS:
                lengths = model.lengths(context, ratio)
                label = [model.name, f"{context:,}", f"{ratio:g}"]
                shape = {"group": model.group, "dim": model.dim, "itemsize": ITEMSIZE}
                decode.append(label + _cells(decoded_token(lengths=lengths, **shape)))
                prompt.append(label + _cells(prompt_work(lengths=lengths, tokens=context, **shape)))
    return {"Attention of one decoded token": decode, "Scores, vectors and compaction after a prefill": prompt}


def _cells(traffic: Traffic) -> list[str]:
    milliseconds = (1000 * traffic.estimated_seconds(chip) for chip in (A100, H100))
    return [f"{traffic.moved / 2**30:.3f}", str(traffic.launches), *(f"{value:.3f}" for value in milliseconds)]


def markdown() -> str:
    """The tables as they stand in docs/kernels.md."""
    lines: list[str] = []
    for title, (header, *rows) in tables().items():
        lines += [f"### {title}, estimated", ""]
        lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)] + [""]
    return "\n".join(lines)


def main() -> None:
    """Print the estimates."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, (header, *rows) in tables().items():
        table = Table(*header, title=f"{title}: estimates, nothing was run on a GPU")
        for row in rows:
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
