"""What a decoded token would launch on a GPU: at most three kernels a layer besides the projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from tests.tiny_models import new_model, prompts
from thinkkv import sdk
from thinkkv.sdk.layer import HeterogeneousLayer
from thinkkv.sdk.policies import CacheDtype

ALLOCATIONS = {"aten::empty", "aten::new_empty", "aten::empty_like"}


class Work(TorchDispatchMode):
    """Counts torch operations that are neither views nor allocations: each is a launch."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not (func.is_view or name in ALLOCATIONS or name in ("aten::detach", "aten::_unsafe_view")):
            self._counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Launches inside the layers' attention, by name."""
    counts: Counter[str] = Counter()
    attend, launch = HeterogeneousLayer.attend, GridExecutor.__call__

    def counting_attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        with Work(counts):
            return attend(*args, **kwargs)

    def counting_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        with torch.utils._python_dispatch._disable_current_modes():  # the interpreter's own torch calls are no launches
            return launch(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HeterogeneousLayer, "attend", counting_attend)
        patch.setattr(GridExecutor, "__call__", counting_launch)
        yield counts


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches of the interpreter")
@pytest.mark.parametrize("cache_dtype", get_args(CacheDtype))
@pytest.mark.parametrize("policy", ["full", "adakv"])
def test_a_decoded_token_launches_three_kernels_a_layer(
    policy: str, cache_dtype: CacheDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THINKKV_KERNELS", "triton")
    model = new_model("llama", 2)
    ids = prompts([300]).ids  # long enough for several splits and their merge
    with (
        torch.inference_mode(),
        sdk.apply(
            model, policy=policy, cache_dtype=cache_dtype, **({} if policy == "full" else {"ratio": 1.0})
        ) as handle,
    ):
        cache = handle.new_cache()
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        with counted(monkeypatch) as launches:
            model(ids[:, :1], past_key_values=cache)
    layers = model.config.num_hidden_layers
    assert launches["append_rows"] == launches["attend_split"] == launches["merge_splits"] == layers
    assert sum(launches.values()) <= 3 * layers, launches
