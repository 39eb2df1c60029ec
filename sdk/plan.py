"""What a policy sees of a prompt, and what it answers: which positions each KV head keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool1d

from thinkkv.kernels.dispatch import operation

Entries = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one KV head, [kept, D] each."""


@dataclass(frozen=True)
class PromptView:
    """One sequence's prompt in one layer, restricted to what the layer's sliding window still admits.

    Args:
        layer, layers: index of the layer, and how many the model has.
        queries: [Hq, Q, D] of the prompt's last Q tokens, rotated; of all N where layers plan by themselves.
        keys, values: [n, N, D].
        scale: softmax scale.
        rehearsed: [n, N] float32, for a policy that rehearses: the most attention that a token got in the rehearsal.
        rehearsed_sum: [n, N] float32, likewise: all that it got, summed over the query heads.
        reread: [n, R, D], for a policy that asks for them: queries of the rehearsal, of all query heads of a group.
        shuffled: [n, R, D], likewise: of its tokens in random order.
    """

    layer: int
    layers: int
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    rehearsed: torch.Tensor | None = None
    rehearsed_sum: torch.Tensor | None = None
    reread: torch.Tensor | None = None
    shuffled: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Prompt tokens, N."""
        return self.keys.shape[1]

    @property
    def kv_heads(self) -> int:
        """KV heads, n."""
        return self.keys.shape[0]

    def window_scores(self, observation_window: int) -> torch.Tensor:
        """[Hq, N] float32: mean attention of the last ``observation_window`` queries."""
        window = min(observation_window, self.tokens)
        newest = self.queries[:, self.queries.shape[1] - window :]
        scores: torch.Tensor = operation("window_scores", newest.device)(newest, self.keys, scale=self.scale)
        return scores

    def per_kv_head(self, scores: torch.Tensor) -> torch.Tensor:
        """[Hq, N] scores averaged over each query group: [n, N]."""
        return scores.unflatten(0, (self.kv_heads, -1)).mean(dim=1)


@dataclass(frozen=True)
class KeepPlan:
    """Which prompt positions every KV head of a layer keeps.

    Args:
        kept: per KV head its positions in the view, ascending, int64.
        heterogeneous: KV heads that the policy classed as heterogeneous.
        head_scores: [n] float32, what the classes were decided by, where there is such a score.
        entries: per KV head [kept, D] keys and [kept, D] values that it stores at these positions, None for their own;
            empty where all heads store their own.
    """

    kept: tuple[torch.Tensor, ...]
    heterogeneous: tuple[int, ...] = ()
    head_scores: torch.Tensor | None = None
    entries: tuple[Entries | None, ...] = ()

    @classmethod
    def nothing(cls, prompt: PromptView) -> KeepPlan:
        """No head keeps a token, as of an empty prompt."""
        return cls(kept=(torch.empty(0, dtype=torch.int64, device=prompt.keys.device),) * prompt.kv_heads)

    @classmethod
    def everything(cls, prompt: PromptView, **labels: object) -> KeepPlan:
        """All heads keep all tokens."""
        positions = torch.arange(prompt.tokens, device=prompt.keys.device)
        return cls(kept=(positions,) * prompt.kv_heads, **labels)  # type: ignore[arg-type]

    @classmethod
    def where(cls, kept: torch.Tensor, **labels: object) -> KeepPlan:
        """The positions where a [n, N] mask is True."""
        return cls(kept=tuple(row.nonzero()[:, 0] for row in kept), **labels)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """Tokens kept, summed over the KV heads."""
        return sum(len(positions) for positions in self.kept)


def pool(scores: torch.Tensor, kernel: int) -> torch.Tensor:
    """Average-pool scores over neighbouring tokens, [n, N] to [n, N]; kernel 1 leaves them alone."""
    if kernel == 1 or scores.shape[1] == 0:
        return scores
    return avg_pool1d(scores[None], kernel, stride=1, padding=kernel // 2, count_include_pad=True)[0]


def best(scores: torch.Tensor, count: int, offset: int = 0) -> torch.Tensor:
    """Positions of the ``count`` highest scores of each row, [n, count] int64, shifted by ``offset``."""
    return scores.topk(min(count, scores.shape[1]), dim=1).indices + offset
