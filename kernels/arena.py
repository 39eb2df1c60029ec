"""The storage of one layer: rows of different length in one arena each for K and V.

A row is one KV head of one sequence. Rows of equal length lie together in a block, which plain torch sees as one dense
tensor; kernels that take all rows in one launch see the flat arenas with an offset and a length per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from thinkkv.kernels.entries import entries_of


class Block:
    """Rows of one length that lie side by side.

    Attributes:
        index: the rows' indices in the layer.
        keys, values: [r, capacity, ...] entries, views into the arenas.
        length: entries in use in every row.
    """

    __slots__ = ("index", "keys", "length", "values")

    def __init__(self, index: tuple[int, ...], keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        self.index, self.keys, self.values, self.length = index, keys, values, length

    @property
    def capacity(self) -> int:
        """Entries that a row has room for."""
        return self.keys.shape[1]


class Arena:
    """All rows of a layer.

    Attributes:
        keys, values: [S, ...], the storage: entries (``thinkkv.kernels.entries``).
        blocks: rows of equal length, in the order in which they lie.
        order: [R] int64, row of each place when the blocks are laid end to end; None when that is the rows' own order.
        places: [R] int64, the inverse: place of each row.
        offsets: [R] int64, by row index: first entry of the row in the storage.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[Sequence[int], int]],
        *,
        spare: int,
        like: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Allocate.

        Args:
            blocks: row indices and length of each block.
            spare: entries per row beyond its length.
            like: keys and values, [..., E] entries each, whose size E, dtype and device the storage has.
        """
        device = like[0].device
        sizes = [len(index) * (length + spare) for index, length in blocks]
        self.keys, self.values = (entries.new_empty(sum(sizes), entries.shape[-1]) for entries in like)
        self.blocks = tuple(
            Block(tuple(index), keys.unflatten(0, (len(index), -1)), values.unflatten(0, (len(index), -1)), length)
            for (index, length), keys, values in zip(
                blocks, self.keys.split(sizes), self.values.split(sizes), strict=True
            )
        )
        order = torch.tensor([row for index, _ in blocks for row in index], dtype=torch.int64, device=device)
        self.order = None if torch.equal(order, torch.arange(len(order), device=device)) else order
        self.places = torch.argsort(order)
        capacities = torch.tensor([length + spare for index, length in blocks for _ in index], device=device)
        self.offsets = (capacities.cumsum(0) - capacities)[self.places]
        self._lengths: torch.Tensor | None = None
        self._prepared = False

    def prepare_steps(self) -> None:
        """Ready the arena for compiled steps; doing it again changes nothing."""
        if self._prepared:
            return
        for block in self.blocks:
            for states in (block.keys, block.values):
                states[:, block.length :] = 0  # a mask hides it, but NaN times zero would come through
                torch._dynamo.maybe_mark_dynamic(states, 1)  # growing, or another prompt, needs no other code
        for states in (self.keys, self.values):
            torch._dynamo.maybe_mark_dynamic(states, 0)
        _ = self.lengths  # must exist before it is counted in place
        self._prepared = True

    @property
    def lengths(self) -> torch.Tensor:
        """[R] int32, by row index: entries in use. Once asked for, it is kept up to date in place."""
        if self._lengths is None:
            by_place = [block.length for block in self.blocks for _ in block.index]
            with torch.inference_mode(False):  # so that it can be written in any mode
                self._lengths = torch.tensor(by_place, dtype=torch.int32, device=self.keys.device)[self.places]
        return self._lengths

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token's key and value in one row."""
        return sum(stored.shape[1] * stored.element_size() for stored in (self.keys, self.values))

    def entries(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the storage holds of [..., D] keys and values."""
        return entries_of(keys, self.keys.dtype), entries_of(values, self.values.dtype)

    @property
    def longest(self) -> int:
        """Entries that the longest row has room for."""
        return max(block.capacity for block in self.blocks)

    @property
    def room(self) -> int:
        """Entries that every row still has room for."""
        return min(block.capacity - block.length for block in self.blocks)

    @property
    def used(self) -> int:
        """Entries in use."""
        return sum(len(block.index) * block.length for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, spare capacity included."""
        return self.keys.nbytes + self.values.nbytes

    def lengthen(self, new: int, *, counted: bool = False) -> None:
        """Take note of ``new`` entries written behind every row.

        Args:
            new: how many; negative to forget some.
            counted: whether ``lengths`` has them already.
        """
        for block in self.blocks:
            block.length += new
        if self._lengths is not None and not counted:
            self._lengths += new

    def shorten(self, block: Block, length: int) -> None:
        """Take note that the rows of one block hold less."""
        block.length = length
        if self._lengths is not None:
            self._lengths[list(block.index)] = length

    def split(self, per_row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hand a [R, ...] tensor in row order to the blocks."""
        ordered = per_row if self.order is None else per_row.index_select(0, self.order)
        return (ordered,) if len(self.blocks) == 1 else ordered.split([len(block.index) for block in self.blocks])

    def join(self, per_block: Sequence[torch.Tensor]) -> torch.Tensor:
        """Undo ``split``: [R, ...] in row order."""
        laid = per_block[0] if len(per_block) == 1 else torch.cat(list(per_block))
        return laid if self.order is None else laid.index_select(0, self.places)
