"""What the rows of one layer hold: token positions and limits beside the arena with their keys and values.

Rows of one length (and one limit) form a group, which is a block of the arena. Every row has the same spare capacity,
in proportion to the layer's mean length: so all rows are full at the same time, and growing stays amortised O(1).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from thinkkv.kernels.arena import Arena, Block
from thinkkv.kernels.dispatch import row_operations
from thinkkv.kernels.entries import entries_of

SPARE_TOKENS = 128
SPARE_SHARE = 16
"""The spare capacity of every row: SPARE_TOKENS + mean length / SPARE_SHARE tokens."""


@dataclass(frozen=True)
class Kept:
    """What one row is to hold of the states it is filled from.

    Args:
        entries: [T] int64, which of them.
        positions: [T] int32, their token positions, ascending.
        limit: tokens to which bounded decoding cuts the row back; None where it may grow.
    """

    entries: torch.Tensor
    positions: torch.Tensor
    limit: int | None = None


@dataclass(frozen=True)
class Row:
    """One KV head of one sequence, as it stands in the store.

    Args:
        index: sequence * KV heads + head.
        keys, values: [T, ...] entries, views.
        positions: [T] int32, ascending token positions.
        limit: tokens to which bounded decoding cuts the row back; None where it may grow.
    """

    index: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    limit: int | None = None


class RowGroup:
    """Rows of one length and one limit.

    Attributes:
        block: their keys and values.
        index: [r] int64, the rows' places in the layer.
        placed: [r, P] int32, positions of the first P entries; the later ones follow on without gaps.
        next_placed: [r] int32, position of entry P.
        limit: tokens to which bounded decoding cuts the rows back; None where they may grow.
    """

    def __init__(self, block: Block, placed: torch.Tensor, next_placed: torch.Tensor, limit: int | None) -> None:
        self.block, self.placed, self.next_placed, self.limit = block, placed, next_placed, limit
        self.index = torch.tensor(block.index, device=placed.device)

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.block.length

    @property
    def keys(self) -> torch.Tensor:
        """[r, length, ...] entries."""
        return self.block.keys[:, : self.length]

    @property
    def values(self) -> torch.Tensor:
        """[r, length, ...] entries."""
        return self.block.values[:, : self.length]

    def positions(self) -> torch.Tensor:
        """[r, length] int32: token positions of all entries, ascending."""
        appended = torch.arange(self.length - self.placed.shape[1], dtype=torch.int32, device=self.placed.device)
        return torch.cat([self.placed, self.next_placed[:, None] + appended], dim=1)

    def next_position(self) -> torch.Tensor:
        """[r] int32: position of the next token."""
        return self.next_placed + (self.length - self.placed.shape[1])

    def rows(self) -> list[Row]:
        """The rows, as views."""
        positions = self.positions()
        return [
            Row(index, self.keys[i], self.values[i], positions[i], self.limit)
            for i, index in enumerate(self.block.index)
        ]


class LayerStore:
    """All rows of one layer.

    Attributes:
        arena: their keys and values, as entries (``kernels/entries.py``).
        groups: rows of equal length, longest first, one for each block of the arena.
        dtype: of the model.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept: Sequence[Kept],
        next_positions: torch.Tensor,
        *,
        stored: tuple[torch.dtype, torch.dtype] | None = None,
    ) -> None:
        """Fill the rows from a prompt.

        Args:
            keys, values: [R, N, D].
            kept: per row what it holds of them.
            next_positions: [R] int32, by row index: position that the row's next token will have.
            stored: dtypes of the entries of keys and values (``kernels/entries.py``); None: the model's.
        """
        self._serve(keys.device, keys.dtype)
        key_dtype, value_dtype = stored or (self.dtype, self.dtype)
        like = entries_of(keys[:, :0], key_dtype), entries_of(values[:, :0], value_dtype)
        self._lay_out(like, [row.positions for row in kept], [row.limit for row in kept], next_positions)
        self.operations.compact(self.arena, keys, values, [row.entries for row in kept])

    @classmethod
    def of_rows(
        cls, rows: Sequence[Row], next_positions: torch.Tensor, dtype: torch.dtype, *, appended: int
    ) -> LayerStore:
        """A store of rows as another one had them.

        Args:
            rows: all of a layer, by row index, one at least; copied.
            next_positions: [R] int32: position that the row's next token will have.
            dtype: of the model.
            appended: so many of the last entries of every row follow on without gaps, and may be forgotten.
        """
        store = cls.__new__(cls)
        store._serve(next_positions.device, dtype)
        store._rebuild(rows, next_positions)
        for group in store.groups:
            group.placed = group.placed[:, : group.length - appended].contiguous()
            group.next_placed = group.next_placed - appended
        return store

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append new tokens to every row, in place.

        Args:
            keys, values: [R, Q, D] in row order.
        """
        if self.arena.room < keys.shape[1]:
            with torch.inference_mode(False):  # what inference mode allocates could not be written outside of it
                self._grow(keys.shape[1])
        self.operations.append(self.arena, keys, values)
        self.arena.lengthen(keys.shape[1], counted=self.operations.counting)

    def append_traced(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append one token to every row in a compiled step: ``prepare_step`` made room, its caller counts the token."""
        self.traced.append(self.arena, keys, values)

    def attend(self, query: torch.Tensor, *, scale: float, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Attend Q new tokens to their rows, which end with these tokens.

        Args:
            query: [R, G, Q, D], G query heads per row.
            scale: softmax scale.
            starts: [R, Q] int32, first entry that each query sees; None where it sees all before it.

        Returns:
            [R, G, Q, D].
        """
        operations = self.traced if torch.compiler.is_compiling() else self.operations
        return operations.ragged_decode(self.arena, query, scale=scale, starts=starts)

    def append_ragged(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor) -> None:
        """Append a padded chunk: each row takes only its real tokens.

        Args:
            keys, values: [R, Q, D] in row order.
            real: [R, Q] bool.
        """
        following, (keys, values) = self.next_positions(), self.arena.entries(keys, values)
        rows = [self._extended(row, keys, values, real, following) for row in self.rows()]
        self._rebuild(rows, following + real.sum(dim=1).to(torch.int32))

    def drop_before(self, oldest: torch.Tensor) -> None:
        """Free the entries of each row that stand before ``oldest`` [R] (positions): a sliding window moved on."""
        rows = [_without_head(row, int((row.positions < oldest[row.index]).sum())) for row in self.rows()]
        self._rebuild(rows, self.next_positions())

    def keep(self, group: RowGroup, entries: torch.Tensor) -> None:
        """Keep only some entries of each row of a group, in place.

        Args:
            group: one of the store's.
            entries: [r, m] int64, ascending.
        """
        following = group.next_position()
        group.placed, group.next_placed = group.positions().gather(1, entries), following
        block, count = group.block, entries.shape[1]
        for arena in (block.keys, block.values):
            arena[:, :count] = arena.gather(1, entries[:, :, None].expand(-1, -1, arena.shape[2]))
        self.arena.shorten(block, count)
        self._shrink()

    def truncate(self, tokens: int) -> None:
        """Forget the last ``tokens`` appended tokens of every row."""
        self.arena.lengthen(-tokens)
        self._shrink()

    def rows(self) -> list[Row]:
        """All rows, as views, by row index."""
        return sorted((row for group in self.groups for row in group.rows()), key=lambda row: row.index)

    def starts(self, lengths: torch.Tensor, new: int, window: int) -> torch.Tensor:
        """First entry that each of the newest queries sees through a sliding window.

        Args:
            lengths: [R], entries in use.
            new: Q, newest tokens of every row.
            window: tokens that a query sees, itself included.

        Returns:
            [R, Q] int32, by row index.
        """
        ages = torch.arange(new, 0, -1, dtype=torch.int32, device=lengths.device)
        found = []
        for group, length in zip(self.groups, self.arena.split(lengths), strict=True):
            following = group.next_placed + (length - group.placed.shape[1])
            oldest = following[:, None] - (ages + (window - 1))
            placed = torch.searchsorted(group.placed, oldest.contiguous(), out_int32=True)
            # The entries that were appended follow on without gaps.
            found.append(placed + (oldest - group.next_placed[:, None]).clamp(min=0))
        return self.arena.join(found)

    def prepare_step(self) -> None:
        """Make room for one more token, and ready a new arena for compiled steps."""
        if self.arena.room == 0:
            with torch.inference_mode(False):
                self._grow(1)
        self.arena.prepare_steps()

    def next_positions(self) -> torch.Tensor:
        """[R] int32, by row index: position of the next token."""
        return torch.cat([group.next_position() for group in self.groups])[self.arena.places].to(torch.int32)

    def _serve(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose the operations of the device."""
        self.operations = row_operations(device)
        self.traced = row_operations(device, traced=True)
        self.dtype = dtype

    def _lay_out(
        self,
        like: tuple[torch.Tensor, torch.Tensor],
        positions: Sequence[torch.Tensor],
        limits: Sequence[int | None],
        next_positions: torch.Tensor,
        spare: int | None = None,
    ) -> None:
        """Make arena and groups for rows that hold these positions; the arena is not filled."""
        alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (mine, limit) in enumerate(zip(positions, limits, strict=True)):
            alike[len(mine), limit or 0].append(index)
        keys = sorted(alike, reverse=True)
        total = sum(len(mine) for mine in positions)
        self.arena = Arena(
            [(alike[key], key[0]) for key in keys], spare=spare or roomy(total, len(positions)), like=like
        )
        self.groups = [
            RowGroup(
                block,
                torch.stack([positions[i] for i in block.index]),
                next_positions[list(block.index)],
                limits[block.index[0]],
            )
            for block in self.arena.blocks
        ]

    def _rebuild(self, rows: Sequence[Row], next_positions: torch.Tensor) -> None:
        """Store other rows instead, given by row index."""
        like = rows[0].keys, rows[0].values
        self._lay_out(like, [row.positions for row in rows], [row.limit for row in rows], next_positions)
        for block in self.arena.blocks:
            for place, index in enumerate(block.index):
                block.keys[place, : block.length] = rows[index].keys
                block.values[place, : block.length] = rows[index].values

    def _grow(self, new: int) -> None:
        self._move(roomy(self.arena.used + new * len(self.arena.places), len(self.arena.places)) + new)

    def _shrink(self) -> None:
        """Give spare capacity back that a new arena would not have."""
        spare = roomy(self.arena.used, len(self.arena.places))
        if self.arena.keys.shape[0] > self.arena.used + spare * len(self.arena.places):
            self._move(spare)

    def _move(self, spare: int) -> None:
        """Move into an arena with another spare capacity."""
        old = self.arena
        blocks = [(block.index, block.length) for block in old.blocks]
        self.arena = Arena(blocks, spare=spare, like=(old.keys, old.values))
        for group, mine, target in zip(self.groups, old.blocks, self.arena.blocks, strict=True):
            target.keys[:, : mine.length] = mine.keys[:, : mine.length]
            target.values[:, : mine.length] = mine.values[:, : mine.length]
            group.block = target

    @staticmethod
    def _extended(
        row: Row, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor, following: torch.Tensor
    ) -> Row:
        new = real[row.index]
        count = int(new.sum())
        added = following[row.index] + torch.arange(count, dtype=torch.int32, device=keys.device)
        return Row(
            row.index,
            torch.cat([row.keys, keys[row.index, new]]),
            torch.cat([row.values, values[row.index, new]]),
            torch.cat([row.positions, added]),
            row.limit,
        )


def roomy(entries: int, rows: int) -> int:
    """Spare capacity per row for rows that hold so many entries together; geometric, so that growing is rare."""
    return SPARE_TOKENS + entries // (SPARE_SHARE * rows)


def _without_head(row: Row, count: int) -> Row:
    return Row(row.index, row.keys[count:], row.values[count:], row.positions[count:], row.limit)
