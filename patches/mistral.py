"""Mistral, with a sliding window in every layer or in none."""

from thinkkv.patches.architecture import Architecture, Projections, uniform_window
from thinkkv.patches.registry import register

MISTRAL = register(
    Architecture(
        model_type="mistral",
        attention="MistralAttention",
        projections=Projections(q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
        sliding_window=uniform_window("sliding_window"),
    )
)
