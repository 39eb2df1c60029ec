"""The storage of one layer: rows of (sequence, KV head), gathered into groups of equal length.

Each group owns one preallocated arena for K and one for V. All rows of a group have the same length, so attention over
it is dense, and a new token is written in place. Separate arenas per group let a short group grow without the long
rows being copied, which keeps appending amortised O(1) at any length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SPARE_TOKENS = 128
SPARE_SHARE = 16
"""A row's spare capacity is at most SPARE_TOKENS + length / SPARE_SHARE tokens."""


def roomy(length: int) -> int:
    """Capacity to allocate for rows of ``length`` tokens; geometric, so that growing is rare."""
    return length + SPARE_TOKENS + length // SPARE_SHARE


@dataclass
class Row:
    """One KV head of one sequence while its row is built or moved.

    Args:
        index: sequence * KV heads + head.
        keys, values: [T, D]; views are fine, they are copied into the arena.
        positions: [T] int32, ascending token positions.
        limit: tokens to which bounded decoding cuts the row back; None where it may grow.
    """

    index: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    limit: int | None = None


class RowGroup:
    """Rows of one length in one arena each for K and V.

    Attributes:
        index: [r] int64, the rows' places in the layer.
        keys, values: [r, capacity, D]; the first ``length`` entries of every row are in use.
        length: tokens per row.
        placed: [r, P] int32, positions of the first P entries; the later ones follow on without gaps.
        next_placed: [r] int32, position of entry P.
        limit: tokens to which bounded decoding cuts the rows back; None where they may grow.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        first = rows[0]
        self.length = len(first.positions)
        self.limit = first.limit
        device = first.keys.device
        shape = (len(rows), roomy(self.length), first.keys.shape[-1])
        self.index = torch.tensor([row.index for row in rows], device=device)
        self.keys = torch.empty(shape, dtype=first.keys.dtype, device=device)
        self.values = torch.empty(shape, dtype=first.values.dtype, device=device)
        for i_row, row in enumerate(rows):
            self.keys[i_row, : self.length] = row.keys
            self.values[i_row, : self.length] = row.values
        self.placed = torch.stack([row.positions for row in rows])
        self.next_placed = torch.zeros(len(rows), dtype=torch.int32, device=device)

    @property
    def capacity(self) -> int:
        """Tokens a row can hold before the arena grows."""
        return self.keys.shape[1]

    def positions(self) -> torch.Tensor:
        """[r, length] int32: token positions of all entries, ascending."""
        appended = torch.arange(self.length - self.placed.shape[1], dtype=torch.int32, device=self.placed.device)
        return torch.cat([self.placed, self.next_placed[:, None] + appended], dim=1)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write [r, Q, D] new entries behind every row, in place."""
        end = self.length + keys.shape[1]
        if end > self.capacity:
            self._reallocate(end)
        self.keys.narrow(1, self.length, keys.shape[1]).copy_(keys)
        self.values.narrow(1, self.length, keys.shape[1]).copy_(values)
        self.length = end

    def rows(self) -> list[Row]:
        """The rows in use, as views."""
        positions = self.positions()
        return [
            Row(index, self.keys[i, : self.length], self.values[i, : self.length], positions[i], self.limit)
            for i, index in enumerate(self.index.tolist())
        ]

    def keep(self, entries: torch.Tensor) -> None:
        """Keep only some entries of each row, in place.

        Args:
            entries: [r, m] int64, ascending.
        """
        following = self.next_position()
        self.placed = self.positions().gather(1, entries)
        self.next_placed = following
        self.keys, self.values = (self._gathered(arena, entries) for arena in (self.keys, self.values))
        self.length = entries.shape[1]

    def next_position(self) -> torch.Tensor:
        """[r] int32: position of the next token."""
        return self.next_placed + (self.length - self.placed.shape[1])

    @staticmethod
    def _gathered(arena: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        rows, kept = entries.shape
        chosen = arena.gather(1, entries[:, :, None].expand(-1, -1, arena.shape[2]))
        if arena.shape[1] > roomy(kept):  # a long chunk had made it grow
            arena = arena.new_empty(rows, roomy(kept), arena.shape[2])
        arena[:, :kept] = chosen
        return arena

    def truncate(self, tokens: int) -> None:
        """Forget the last ``tokens`` entries of every row."""
        self.length -= tokens
        if self.capacity > roomy(self.length):
            self._reallocate(self.length)

    def _reallocate(self, length: int) -> None:
        """Move into arenas with room for ``length`` tokens and the usual spare."""
        self.keys, self.values = (self._copied(arena, roomy(length)) for arena in (self.keys, self.values))

    def _copied(self, arena: torch.Tensor, capacity: int) -> torch.Tensor:
        with torch.inference_mode(False):  # what inference mode allocates could not be written outside of it
            grown = arena.new_empty(arena.shape[0], capacity, arena.shape[2])
        grown[:, : self.length] = arena[:, : self.length]
        return grown


class LayerStore:
    """All rows of one layer.

    Attributes:
        groups: rows of equal length, longest first.
        order: [R] int64, row of each place when the groups are laid end to end; None when that is the rows' own order.
        places: [R] int64, the inverse: place of each row.
    """

    def __init__(self, rows: Sequence[Row], next_positions: torch.Tensor) -> None:
        """Build the groups.

        Args:
            rows: every row of the layer, in any order.
            next_positions: [R] int32, by row index: position that the row's next token will have.
        """
        self.groups: list[RowGroup] = []
        self._regroup(rows, next_positions)

    def _regroup(self, rows: Sequence[Row], next_positions: torch.Tensor) -> None:
        alike: defaultdict[tuple[int, int], list[Row]] = defaultdict(list)
        for row in rows:
            alike[len(row.positions), row.limit or 0].append(row)
        self.groups = [RowGroup(alike[key]) for key in sorted(alike, reverse=True)]
        for group in self.groups:
            group.next_placed = next_positions[group.index]
        order = torch.cat([group.index for group in self.groups])
        ordered = torch.equal(order, torch.arange(len(order), device=order.device))
        self.order = None if ordered else order
        self.places = torch.argsort(order)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append new tokens to every row.

        Args:
            keys, values: [R, Q, D] in row order.
        """
        for group, new_keys, new_values in zip(self.groups, self.split(keys), self.split(values), strict=True):
            group.append(new_keys, new_values)

    def append_ragged(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor) -> None:
        """Append a padded chunk: each row takes only its real tokens.

        Args:
            keys, values: [R, Q, D] in row order.
            real: [R, Q] bool.
        """
        next_positions = self.next_positions()
        rows = [self._extended(row, keys, values, real, next_positions) for row in self.rows()]
        self._regroup(rows, next_positions + real.sum(dim=1).to(torch.int32))

    def drop_before(self, oldest: torch.Tensor) -> None:
        """Free the entries of each row that stand before ``oldest`` [R] (positions): a sliding window moved on."""
        rows = [_without_head(row, int((row.positions < oldest[row.index]).sum())) for row in self.rows()]
        self._regroup(rows, self.next_positions())

    def truncate(self, tokens: int) -> None:
        """Forget the last ``tokens`` appended tokens of every row."""
        for group in self.groups:
            group.truncate(tokens)

    def rows(self) -> list[Row]:
        """All rows in use, as views, by row index."""
        return sorted((row for group in self.groups for row in group.rows()), key=lambda row: row.index)

    def next_positions(self) -> torch.Tensor:
        """[R] int32, by row index: position of the next token."""
        return torch.cat([group.next_position() for group in self.groups])[self.places].to(torch.int32)

    def split(self, per_row: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hand a [R, ...] tensor in row order to the groups."""
        ordered = per_row if self.order is None else per_row.index_select(0, self.order)
        return (ordered,) if len(self.groups) == 1 else ordered.split([len(group.index) for group in self.groups])

    def join(self, per_group: Sequence[torch.Tensor]) -> torch.Tensor:
        """Undo ``split``: [R, ...] in row order."""
        laid = per_group[0] if len(per_group) == 1 else torch.cat(list(per_group))
        return laid if self.order is None else laid.index_select(0, self.places)

    @staticmethod
    def _extended(
        row: Row, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor, next_positions: torch.Tensor
    ) -> Row:
        new = real[row.index]
        count = int(new.sum())
        added = next_positions[row.index] + torch.arange(count, dtype=torch.int32, device=keys.device)
        return Row(
            row.index,
            torch.cat([row.keys, keys[row.index, new]]),
            torch.cat([row.values, values[row.index, new]]),
            torch.cat([row.positions, added]),
            row.limit,
        )


def _without_head(row: Row, count: int) -> Row:
    return Row(row.index, row.keys[count:], row.values[count:], row.positions[count:], row.limit)
