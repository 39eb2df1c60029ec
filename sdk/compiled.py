"""Decode with one compiled graph: a step's Python and its many small operations become a few fused loops.

The graph is that of a single new token per sequence. What changes from token to token is in tensors, so it is compiled
once. On a CPU it also turns single-row matrix products into reductions, which then read the weights with all threads
at the speed of memory, fused with their neighbours; the library's own product of a row and a matrix uses one thread.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from thinkkv.sdk.cache import HeterogeneousCache


def row_product(row: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``row @ matrix`` as a reduction in float32.

    Args:
        row: [1, K].
        matrix: [K, N].

    Returns:
        [1, N] in row's dtype.
    """
    return (row.float() * matrix.T.float()).sum(dim=1).to(row.dtype)[None]


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """The compiler backend: inductor, with ``row_product`` for single rows on a CPU."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    usual = table[torch.ops.aten.mm.default]

    def product(left: torch.Tensor, right: torch.Tensor) -> Any:
        single = left.shape[0] == 1 and left.device.type == "cpu"
        return row_product(left, right) if single else usual(left, right)

    table = {**table, torch.ops.aten.mm.default: product}
    return compile_fx(graph, list(inputs), decompositions=table)  # type: ignore[return-value]


class CompiledStep:
    """The forward of a patched model that compiles steps of one token and leaves everything else alone.

    Args:
        model: the causal LM; its forward so far is what is compiled.
        backend: of ``torch.compile``.
    """

    def __init__(self, model: nn.Module, backend: str | Callable[..., Any]) -> None:
        self._model, self._forward, self._backend = model, model.forward, backend
        self.__signature__ = inspect.signature(model.forward)

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled code, which belongs to this model and not to a copy of it."""
        return {name: value for name, value in vars(self).items() if name != "_compiled"}

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._forward, fullgraph=True, backend=self._backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        inputs = self.__signature__.bind(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        if not self._is_step(inputs):
            return self._forward(*args, **kwargs)
        ids, cache = inputs["input_ids"], inputs["past_key_values"]
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = torch.full_like(ids, cache.get_seq_length())
        # A prepared mask keeps the model from making one: nothing is hidden from one new token per row.
        inputs["attention_mask"] = ids.new_ones(1, 1, 1, 1)
        for layer in cache.layers:
            layer.prepare_step()
        try:
            out = self._compiled(**inputs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            warnings.warn(
                "too many different cache layouts were compiled, this step runs uncompiled - "
                "fix the classes of the heads with a profile, or call torch.compiler.reset()",
                stacklevel=2,
            )
            return self._forward(*args, **kwargs)
        for layer in cache.layers:
            layer.count_step()
        return out

    def _is_step(self, inputs: dict[str, Any]) -> bool:
        ids, cache, mask = (inputs.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        if ids is None or ids.shape[1] != 1 or self._model.training or torch.is_grad_enabled():
            return False
        if not isinstance(cache, HeterogeneousCache) or not cache.get_seq_length():
            return False
        return mask is None or (mask.ndim == 2 and bool(mask[:, -1].all()))
