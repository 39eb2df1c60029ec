"""Llama 2 and 3.x, and models of the same code such as SmolLM2."""

from thinkkv.patches.architecture import Architecture, Projections
from thinkkv.patches.registry import register

LLAMA = register(
    Architecture(
        model_type="llama",
        attention="LlamaAttention",
        projections=Projections(q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
    )
)
