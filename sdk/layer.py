"""One layer of a heterogeneous cache: attend to the prompt, compact it, then append in place.

The layer attends to its whole prompt once, compacts it at once to what the policy keeps, and from then on writes new
tokens in place. So the peak over the model is one full layer plus the compacted rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from transformers.cache_utils import CacheLayerMixin

from thinkkv.kernels.entries import states_of
from thinkkv.patches.errors import UnsupportedGenerationError
from thinkkv.sdk.bounded import RecentQueries, entries_to_keep, rows_over_limit
from thinkkv.sdk.compression import Compression
from thinkkv.sdk.plan import Entries, KeepPlan, PromptView
from thinkkv.sdk.prompt_attention import prompt_attention
from thinkkv.sdk.store import SPARE_TOKENS, Kept, LayerStore
from thinkkv.sdk.whole_prompt import WholePrompt

T = TypeVar("T")


class NewTokens:
    """A layer's new keys and values, on their way from the cache to thinkkv's attention function.

    It is no tensor on purpose: another attention function would attend to the new tokens alone, so it must fail.
    """

    __slots__ = ("keys", "layer", "values")

    def __init__(self, layer: HeterogeneousLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def __getattr__(self, name: str) -> NoReturn:
        # Special names are probed by libraries and must look absent rather than break them.
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedGenerationError(
            "a thinkkv cache was passed to a model that does not attend through thinkkv - "
            "call sdk.apply(model) before using the cache, and do not change the attention implementation"
        )


@dataclass(frozen=True)
class SequencePlan:
    """What was decided for one sequence in one layer.

    Args:
        prompt_tokens: real tokens of the prompt.
        kept_per_head: tokens kept of it, per KV head.
        heterogeneous: the KV heads classed so.
        head_scores: per KV head, where the policy has such scores.
        in_window: per KV head the kept positions, int32, where a sliding window will leave them behind; else empty.
    """

    prompt_tokens: int
    kept_per_head: tuple[int, ...]
    heterogeneous: tuple[int, ...]
    head_scores: tuple[float, ...] | None
    in_window: tuple[torch.Tensor, ...] = ()


class HeterogeneousLayer(CacheLayerMixin):
    """The cache of one layer."""

    is_sliding = False

    def __init__(self, index: int, compression: Compression) -> None:
        super().__init__()
        self.index = index
        self.compression = compression
        self.shape = compression.shapes[index]
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the storage."""
        self.store: LayerStore | None = None
        self.plans: tuple[SequencePlan, ...] = ()
        self.seen = 0
        self.recent_queries = RecentQueries()
        self.is_initialized = False

    @property
    def appended(self) -> tuple[int, ...]:
        """Real tokens that each sequence has received after its prompt."""
        if self.store is None:
            return ()
        following = self.store.next_positions()[:: self.shape.kv_heads].tolist()
        return tuple(end - plan.prompt_tokens for end, plan in zip(following, self.plans, strict=True))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare: storage is sized when the prompt's plan is known."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hand the new tokens over to the attention function, which attends and stores them."""
        new = NewTokens(self, key_states, value_states)
        return new, new

    def get_seq_length(self) -> int:
        """Tokens seen, padding included, evicted ones too."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of a mask over everything seen."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.14

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        real: torch.Tensor | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Attend new tokens to this layer and store them.

        Args:
            query: [B, Hq, Q, D].
            keys, values: [B, n, Q, D] of the same tokens.
            scale: softmax scale.
            real: [B, Q] bool, False at padding; None where there is none.
            dropout: probability, in training.

        Returns:
            [B, Hq, Q, D].
        """
        if torch.compiler.is_compiling():
            return self._step(query, keys, values, scale)
        if self.store is None:
            # As projected, the heads of a token lie side by side; attention and compaction read head by head.
            keys, values = keys.contiguous(), values.contiguous()
            out = prompt_attention(
                query, keys, values, scale=scale, real=real, window=self.shape.window, dropout=dropout
            )
            with bookkeeping():
                self.compact(WholePrompt(query, keys, values, scale, real))
        else:
            if keys.requires_grad:
                keys, values = keys.detach(), values.detach()
            self._append(self.store, keys, values, real)
            out = self._attend_rows(self.store, query, scale, real)
            if real is not None or query.shape[2] > SPARE_TOKENS:
                self._leave_window(self.store)  # such a chunk has made the arena outgrow the window
            if self.compression.bounds(self.index):
                with bookkeeping():
                    self._cut_back(self.store, query, scale, real)
        self.seen += query.shape[2]
        return out

    def compact(self, prompt: WholePrompt) -> None:
        """Fill the store with what the policy keeps of a batch of prompts."""
        self.fill(prompt, [self._plan(prompt, sequence) for sequence in range(len(prompt.lengths))])

    def view(self, prompt: WholePrompt, sequence: int) -> PromptView:
        """What the policy sees of one sequence in this layer."""
        visible = self.shape.visible(prompt.lengths[sequence])
        return prompt.view(sequence, self.index, len(self.compression.shapes), visible)

    def fill(self, prompt: WholePrompt, plans: Sequence[KeepPlan]) -> None:
        """Fill the store with what one plan per sequence keeps."""
        kept: list[Kept] = []
        summaries, ends = [], []
        device = prompt.keys.device
        for plan, mine, length in zip(plans, prompt.columns, prompt.lengths, strict=True):
            column = torch.arange(prompt.keys.shape[2], device=device)[mine]
            first = length - self.shape.visible(length)
            for head, chosen in enumerate(plan.kept):
                positions = chosen + first
                kept.append(Kept(column[positions], positions.to(torch.int32), self._limit(plan, head)))
            summaries.append(self._summary(plan, length, first))
            ends += [length] * self.shape.kv_heads
        following = torch.tensor(ends, dtype=torch.int32, device=device)
        stored = self.compression.policy.stored
        keys, values = _stored_entries(prompt, plans, kept)
        self.store = LayerStore(keys.flatten(0, 1), values.flatten(0, 1), kept, following, stored=stored)
        self.plans = tuple(summaries)
        self.is_initialized = True

    def prepare_step(self) -> None:
        """Before a compiled step: room for its token, and everything that it reads in place."""
        assert self.store is not None
        if self.shape.window is not None and self.store.arena.room == 0:
            self._leave_window(self.store)
        self.store.prepare_step()

    def count_step(self) -> None:
        """After a compiled step."""
        assert self.store is not None
        self.store.arena.lengthen(1, counted=True)
        self.seen += 1

    def _step(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """One new token per sequence, traced by a compiler: changes tensors only; ``count_step`` does the rest."""
        assert self.store is not None
        batch, heads, _, dim = query.shape
        self.store.append_traced(keys.flatten(0, 1), values.flatten(0, 1))
        rows = query.reshape(batch * self.shape.kv_heads, self.shape.query_group, 1, dim)
        lengths, window = self.store.arena.lengths, self.shape.window
        starts = None if window is None else self.store.starts(lengths, 1, window)
        return self.store.attend(rows, scale=scale, starts=starts).reshape(batch, heads, 1, dim)

    def kept_positions(self) -> list[list[list[int]]]:
        """Token positions in store: ``[sequence][KV head]``, each ascending."""
        return self._by_sequence([row.positions.tolist() for row in self.store.rows()] if self.store else [])

    def kept_entries(self) -> list[list[Entries]]:
        """What is stored as their keys and values: ``[sequence][KV head]``, [kept, D] each."""
        store = self.store
        if store is None:
            return []
        rows = ((row.keys, row.values) for row in store.rows())
        return self._by_sequence(
            [(states_of(keys, store.dtype), states_of(values, store.dtype)) for keys, values in rows]
        )

    def _by_sequence(self, rows: list[T]) -> list[list[T]]:
        return [rows[i : i + self.shape.kv_heads] for i in range(0, len(rows), self.shape.kv_heads)]

    @property
    def croppable(self) -> int:
        """How many of the newest tokens every row still holds one by one."""
        groups = self.store.groups if self.store else []
        return min((group.length - group.placed.shape[1] for group in groups), default=0)

    def crop(self, tokens: int) -> None:
        """Forget the newest ``tokens``, at most ``croppable``."""
        if self.store is not None:
            self.store.truncate(tokens)
            self.seen -= tokens

    def _summary(self, plan: KeepPlan, prompt_tokens: int, first: int) -> SequencePlan:
        """What a report needs of a plan; ``first`` is the position of the plan's entry 0."""
        windowed = self.shape.window is not None
        return SequencePlan(
            prompt_tokens=prompt_tokens,
            kept_per_head=tuple(map(len, plan.kept)),
            heterogeneous=plan.heterogeneous,
            head_scores=None if plan.head_scores is None else tuple(plan.head_scores.tolist()),
            in_window=tuple((kept + first).to(torch.int32) for kept in plan.kept) if windowed else (),
        )

    def _plan(self, prompt: WholePrompt, sequence: int) -> KeepPlan:
        view = self.view(prompt, sequence)
        if view.tokens == 0:
            return KeepPlan.nothing(view)
        budget = self.compression.allocate(prompt.lengths[sequence])[self.index]
        return self.compression.policy.plan(view, budget)

    def _limit(self, plan: KeepPlan, head: int) -> int | None:
        """To how many tokens bounded decoding cuts a head back; None where it may grow."""
        bounded = self.compression.bounds(self.index) and head not in plan.heterogeneous
        return self.compression.limit(len(plan.kept[head])) if bounded else None

    def _cut_back(self, store: LayerStore, query: torch.Tensor, scale: float, real: torch.Tensor | None) -> None:
        """Bring rows that have grown a segment beyond their limit back to it."""
        if real is None:
            self.recent_queries.add(query)
        else:
            self.recent_queries.forget()
        for group in rows_over_limit(store.groups):
            queries = self.recent_queries.per_row(self.shape.query_group, group.length)
            mine = None if queries is None else queries[group.index]
            store.keep(group, entries_to_keep(group, mine, self.compression.policy, scale))

    def _leave_window(self, store: LayerStore) -> None:
        """Free what a sliding window has left behind."""
        if self.shape.window is not None:
            with bookkeeping():
                store.drop_before(store.next_positions() - self.shape.window + 1)

    def _append(self, store: LayerStore, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None) -> None:
        new = keys.shape[2]
        key_rows, value_rows = keys.flatten(0, 1), values.flatten(0, 1)
        if self.shape.window is not None and store.arena.room < new:
            self._leave_window(store)
        if real is None:
            store.append(key_rows, value_rows)
        else:
            with bookkeeping():
                store.append_ragged(key_rows, value_rows, real.repeat_interleave(self.shape.kv_heads, dim=0))

    def _attend_rows(
        self, store: LayerStore, query: torch.Tensor, scale: float, real: torch.Tensor | None
    ) -> torch.Tensor:
        if real is not None:
            return self._attend_padded(store, query, scale, real)
        batch, heads, new, dim = query.shape
        rows = query.reshape(batch * self.shape.kv_heads, self.shape.query_group, new, dim)
        out = store.attend(rows, scale=scale, starts=self._starts(store, new))
        return out.reshape(batch, heads, new, dim)

    def _attend_padded(self, store: LayerStore, query: torch.Tensor, scale: float, real: torch.Tensor) -> torch.Tensor:
        """A padded chunk, its real tokens brought to the end, where the rows have them."""
        to_end = real.to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None].expand_as(query)
        attended = self._attend_rows(store, query.gather(2, to_end), scale, None)
        return torch.empty_like(query).scatter(2, to_end, attended).masked_fill(~real[:, None, :, None], 0)

    def _starts(self, store: LayerStore, new: int) -> torch.Tensor | None:
        """[R, Q] int32: first entry that each of the newest queries sees through the window; None without need."""
        window = self.shape.window
        if window is None or self.seen + new <= window:
            return None
        return store.starts(store.arena.lengths, new, window)


def _stored_entries(prompt: WholePrompt, plans: Sequence[KeepPlan], kept: Sequence[Kept]) -> Entries:
    """[B, n, N, D] each: the prompts' own keys and values, but where a plan has others."""
    if not any(plan.entries for plan in plans):
        return prompt.keys, prompt.values
    keys, values = prompt.keys.clone(), prompt.values.clone()
    planned = (mine for plan in plans for mine in plan.entries or (None,) * len(plan.kept))
    for row, (places, mine) in enumerate(zip(kept, planned, strict=True)):
        if mine is not None:
            for states, others in zip((keys, values), mine, strict=True):
                states.flatten(0, 1)[row, places.entries] = others.to(states.dtype)
    return keys, values


@contextmanager
def bookkeeping() -> Iterator[None]:
    """Without gradients, but with normal tensors: a cache filled in inference mode may be continued outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield
