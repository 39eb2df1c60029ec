"""Many rows of half precision on a CPU that has no instructions for it: multiplied in float32, block by block.

torch leaves bfloat16 and float16 to loops of its own where its library of matrix products does not take them: on a
processor with AVX2 alone seven to nine times as slow as float32. Widening weights costs little once many rows
share them.
"""

from __future__ import annotations

from functools import cache

import torch

BLOCK_ROWS = 1024
BLOCK_WEIGHTS = 1 << 20
"""Of inputs and weights in float32 at a time: a few MiB, which the processor's own caches hold in part."""

_LIBRARY_TAKES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def pays_for(dtype: torch.dtype) -> bool:
    """Whether torch's library of matrix products refuses this dtype on this processor.

    torch asks the same question, by a name that is not public: where that is gone, nothing is widened.
    """
    library_takes = getattr(torch.ops.mkldnn, _LIBRARY_TAKES.get(dtype, ""), None)
    return library_takes is not None and not library_takes()


def product(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As the reference beside it; sums are float32 and rounded once."""
    rows = inputs.reshape(-1, weight.shape[1])
    out = rows.new_empty(len(rows), len(weight))
    block_outs = max(1, BLOCK_WEIGHTS // weight.shape[1])
    for block_in, block_out in zip(rows.split(BLOCK_ROWS), out.split(BLOCK_ROWS), strict=True):
        wide = block_in.float()
        for start in range(0, len(weight), block_outs):
            outs = slice(start, start + block_outs)
            found = wide @ weight[outs].float().T
            block_out[:, outs] = found if bias is None else found.add_(bias[outs])
    return out.view(*inputs.shape[:-1], len(weight))
