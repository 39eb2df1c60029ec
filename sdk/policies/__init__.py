"""Cache policies by name; a new one is a file beside these and a line here."""

from __future__ import annotations

from thinkkv.patches.errors import BudgetError
from thinkkv.sdk.policies.adakv import AdaKV
from thinkkv.sdk.policies.evidence_kv import EvidenceKV
from thinkkv.sdk.policies.full import Full
from thinkkv.sdk.policies.kvzip import KVzip
from thinkkv.sdk.policies.matched_kv import MatchedKV
from thinkkv.sdk.policies.policy import CacheDtype, Policy
from thinkkv.sdk.policies.pyramidkv import PyramidKV
from thinkkv.sdk.policies.rehearsed_kv import RehearsedKV
from thinkkv.sdk.policies.reread_kv import RereadKV
from thinkkv.sdk.policies.retrieval_kv import RetrievalKV
from thinkkv.sdk.policies.snapkv import SnapKV
from thinkkv.sdk.policies.streaming_llm import StreamingLLM
from thinkkv.sdk.policies.task_kv import TaskKV

_ALL: tuple[type[Policy], ...] = (
    Full,
    TaskKV,
    RetrievalKV,
    EvidenceKV,
    RehearsedKV,
    RereadKV,
    MatchedKV,
    StreamingLLM,
    SnapKV,
    PyramidKV,
    AdaKV,
    KVzip,
)
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in _ALL}

__all__ = [
    "POLICIES",
    "AdaKV",
    "CacheDtype",
    "EvidenceKV",
    "Full",
    "KVzip",
    "MatchedKV",
    "Policy",
    "PyramidKV",
    "RehearsedKV",
    "RereadKV",
    "RetrievalKV",
    "SnapKV",
    "StreamingLLM",
    "TaskKV",
]


def policy_named(name: str) -> Policy:
    """The policy of this name with its defaults.

    Raises:
        BudgetError: there is none.
    """
    if name not in POLICIES:
        raise BudgetError(f"no policy {name!r} - choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
