"""Qwen2, Qwen2.5 (the same code) and Qwen3, whose queries and keys are normalised per head."""

from thinkkv.patches.architecture import Architecture, Projections, per_layer_window
from thinkkv.patches.registry import register

QWEN2 = register(
    Architecture(
        model_type="qwen2",
        attention="Qwen2Attention",
        projections=Projections(q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
        sliding_window=per_layer_window("sliding_window"),
    )
)

QWEN3 = register(
    Architecture(
        model_type="qwen3",
        attention="Qwen3Attention",
        projections=Projections(q="q_proj", k="k_proj", v="v_proj", o="o_proj", q_norm="q_norm", k_norm="k_norm"),
        sliding_window=per_layer_window("sliding_window"),
    )
)
