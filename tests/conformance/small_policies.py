"""Every policy with constants small enough to evict tokens of prompts of a few dozen."""

from __future__ import annotations

from tests.tiny_models import LAYERS
from thinkkv.sdk.policies import (
    AdaKV,
    EvidenceKV,
    Full,
    KVzip,
    MatchedKV,
    Policy,
    PyramidKV,
    RehearsedKV,
    RereadKV,
    RetrievalKV,
    SnapKV,
    StreamingLLM,
    TaskKV,
)

SMALLEST = {
    "full": 0,
    "task-kv": 6,
    "retrieval-kv": 6,
    "evidence-kv": 6,
    "rehearsed-kv": 5,
    "reread-kv": 5,
    "matched-kv": 5,
    "streaming-llm": 3,
    "snapkv": 5,
    "pyramidkv": 5,
    "adakv": 5,
    "kvzip": 5,
}
"""Tokens per head that each policy below cannot do without, by its constants."""

ALWAYS_KEPT = SMALLEST | {
    "task-kv": 10,
    "retrieval-kv": 34,
    "evidence-kv": 34,
    "rehearsed-kv": 26,
    "reread-kv": 26,
    "matched-kv": 26,
    "kvzip": 26,
}
"""Prompts up to this length stay whole."""

NAMES = tuple(SMALLEST)
COMPRESSING = NAMES[1:]


def small_policy(name: str, kv_heads: int) -> Policy:
    """The policy of this name for a tiny model."""
    made_up = tuple(tuple(((7 * layer + 5 * head) % 11) / 11 for head in range(kv_heads)) for layer in range(LAYERS))
    policies: dict[str, Policy] = {
        "full": Full(),
        "task-kv": TaskKV(sinks=2, recent=8, observation_window=4, top=16, pooling=3),
        "retrieval-kv": RetrievalKV(head_scores=made_up, sinks=2, recent=6, observation_window=4, pooling=3),
        "evidence-kv": EvidenceKV(head_scores=made_up, sinks=2, recent=6, observation_window=4, pooling=3),
        "rehearsed-kv": RehearsedKV(head_scores=made_up, power=4, pooling=3, sinks=2, recent=3, whole=26),
        "reread-kv": RereadKV(head_scores=made_up, share=0.2, sinks=2, recent=3, whole=26),
        "matched-kv": MatchedKV(head_scores=made_up, share=0.2, sinks=2, recent=3, whole=26),
        "streaming-llm": StreamingLLM(sinks=2),
        "snapkv": SnapKV(observation_window=4, pooling=3),
        "pyramidkv": PyramidKV(observation_window=4, pooling=3, beta=4),
        "adakv": AdaKV(observation_window=4, pooling=3),
        "kvzip": KVzip(sinks=2, recent=3, whole=26),
    }
    return policies[name]
