"""The linear layer in C against float64, on odd shapes amid NaN, and what it leaves to torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.accuracy import RMS
from thinkkv.kernels.linear import native as kernel
from thinkkv.kernels.linear import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def amid_nan(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A random tensor with NaN before and after it in memory."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 128,), float("nan"), dtype=dtype)
    memory[64 : 64 + size] = torch.randn(size, generator=generator).to(dtype)
    return memory[64 : 64 + size].view(shape)


@given(
    rows=st.integers(1, 8),
    size=st.sampled_from([1, 2, 7, 8, 31, 32, 33, 64, 72, 255, 576, 2500]),
    outs=st.sampled_from([1, 2, 3, 4, 5, 63, 64, 65, 1000]),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_equals_float64(
    rows: int, size: int, outs: int, dtype: torch.dtype, biased: bool, threads: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs, weight = (amid_nan(shape, dtype, generator) for shape in ((rows, size), (outs, size)))
    bias = amid_nan((outs,), dtype, generator) if biased else None
    assert kernel.takes(inputs, weight, bias)
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = kernel.product(inputs, weight, bias)
    finally:
        torch.set_num_threads(usual)
    expected = reference.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    assert (found.double() - expected).norm() <= RMS[dtype] * expected.norm() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_a_row_stays_in_its_row(dtype: torch.dtype) -> None:
    inputs = torch.ones(3, 40, dtype=dtype)
    inputs[1, 39] = float("nan")
    found = kernel.product(inputs, torch.ones(9, 40, dtype=dtype), None)
    assert found.isnan().all(dim=1).tolist() == [False, True, False]
    assert found[[0, 2]].eq(40).all()


def test_inputs_of_any_strides_and_leading_dimensions_are_read_rightly() -> None:
    inputs, weight = torch.randn(24, 2, 3).permute(1, 2, 0), torch.randn(10, 24)
    torch.testing.assert_close(kernel.product(inputs, weight, None), reference.linear(inputs, weight))


WEIGHT = torch.randn(6, 16)
UNFIT: dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {
    "many-rows": lambda: (torch.randn(9, 16), WEIGHT, None),
    "no-rows": lambda: (torch.randn(0, 16), WEIGHT, None),
    "float64": lambda: (torch.randn(1, 16).double(), WEIGHT.double(), None),
    "transposed-weight": lambda: (torch.randn(1, 6), WEIGHT.T, None),
    "subclass": lambda: (torch.randn(1, 16), torch.Tensor._make_subclass(Subclass, WEIGHT), None),
    "gradient": lambda: (torch.randn(1, 16, requires_grad=True), WEIGHT, None),
    "weight-gradient": lambda: (torch.randn(1, 16), torch.nn.Parameter(WEIGHT.clone()), None),
}


class Subclass(torch.Tensor):
    """As quantised weights are."""


@pytest.mark.parametrize("arguments", UNFIT.values(), ids=UNFIT)
def test_what_it_is_not_made_for_goes_to_torch(
    arguments: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
) -> None:
    inputs, weight, bias = arguments()
    assert not kernel.takes(inputs, weight, bias)
    torch.testing.assert_close(kernel.linear(inputs, weight, bias), reference.linear(inputs, weight, bias))


def test_mixed_dtypes_are_torchs_error_and_autocast_is_torchs_work() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        kernel.linear(torch.randn(1, 16).bfloat16(), WEIGHT)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel.linear(torch.randn(1, 16), WEIGHT).dtype == torch.bfloat16


def test_gradients_reach_the_inputs() -> None:
    inputs = torch.randn(1, 16, requires_grad=True)
    kernel.linear(inputs, WEIGHT).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, WEIGHT.sum(dim=0, keepdim=True))


@pytest.mark.parametrize(("rows", "operators"), [(1, 0), (4, 1)])
def test_in_a_compiled_graph_several_rows_are_the_operator_and_one_is_the_compilers(rows: int, operators: int) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    inputs = torch.randn(rows, 16)
    with torch.no_grad():
        found = torch.compile(kernel.linear, backend=keep, fullgraph=True)(inputs, WEIGHT)
    torch.testing.assert_close(found, reference.linear(inputs, WEIGHT))
    assert sum(node.target is kernel.operator for node in graphs[0].graph.nodes) == operators


def test_the_operator_is_known_to_compilers() -> None:
    torch.library.opcheck(
        kernel.operator, (torch.randn(2, 16), WEIGHT, None), test_utils=("test_schema", "test_faketensor")
    )
