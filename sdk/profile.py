"""Head profiles: scores calibrated over prompts that fix which KV heads are heterogeneous.

A profile folder holds ``profile.json`` and the picture ``heads.png``. The file carries a checksum of its own content
and a fingerprint of the model, so that a damaged or foreign profile is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thinkkv.patches.architecture import attention_modules
from thinkkv.patches.errors import ProfileMismatchError
from thinkkv.patches.registry import architecture_of, shapes_of
from thinkkv.sdk.files import write_whole
from thinkkv.sdk.policies import POLICIES, Policy

SCHEMA = 1
PROFILE_FILE = "profile.json"
PICTURE_FILE = "heads.png"
SCORES = {"distance": "task-kv", "retrieval": "retrieval-kv"}
"""Calibration scores, and the policy that each stands for where none is named."""


def score_for(policy: str) -> str:
    """The calibration score that a policy's profile has."""
    score = POLICIES[policy].profile_score
    assert score is not None, f"{policy} takes no profile"
    return score


@dataclass(frozen=True)
class HeadProfile:
    """What a calibration found out about a model's KV heads.

    Args:
        score: ``distance`` (Task-KV's, mean over prompts) or ``retrieval`` (place in the order of elimination).
        scores: [layers][KV heads]; higher means that the head needs its whole cache more.
        heterogeneous: per layer the KV heads that the policy's defaults keep full where the budget allows.
        fingerprint: of the model, from ``fingerprint_of``.
        calibration: how many prompts, and the SHA-256 of their text.
    """

    score: str
    scores: tuple[tuple[float, ...], ...]
    heterogeneous: tuple[tuple[int, ...], ...]
    fingerprint: Mapping[str, Any]
    calibration: Mapping[str, Any]

    @property
    def policy(self) -> str:
        """Name of the policy that the profile brings where none is named."""
        return SCORES[self.score]

    def fix(self, policy: Policy) -> Policy:
        """The same policy with its classes fixed by this profile.

        Raises:
            ProfileMismatchError: the policy does not use this kind of score.
        """
        if policy.profile_score == self.score:
            chosen: Any = policy  # every policy is a dataclass
            fixed: Policy = replace(chosen, head_scores=self.scores)
            return fixed
        served = ", ".join(name for name, own in POLICIES.items() if own.profile_score == self.score)
        raise ProfileMismatchError(
            f"the profile holds {self.score} scores for {served}, not for {policy.name} - "
            f"drop the profile or use --policy {served}"
        )

    def check(self, model: nn.Module) -> None:
        """Raise ProfileMismatchError unless the profile was calibrated on this model (in any dtype)."""
        found = fingerprint_of(model)
        differing = [key for key in found if self.fingerprint.get(key) != found[key]]
        if differing:
            key = differing[0]
            raise ProfileMismatchError(
                f"the profile is of another model: {key} is {self.fingerprint.get(key)!r} there, {found[key]!r} here - "
                "calibrate one for this model with `thinkkv patch`"
            )

    def save(self, folder: str | Path) -> Path:
        """Write ``profile.json`` and ``heads.png``; each is whole or not there.

        Returns:
            The folder.
        """
        from thinkkv.sdk.head_map import draw_head_map  # matplotlib takes a second that loading must not cost

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "policy": self.policy, **asdict(self)}
        text = json.dumps(content | {"sha256": _checksum(content)}, indent=1)
        write_whole(folder / PICTURE_FILE, draw_head_map(self))
        write_whole(folder / PROFILE_FILE, (text + "\n").encode())
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> HeadProfile:
        """Read a profile folder.

        Raises:
            ProfileMismatchError: there is none, or it is damaged or of a newer schema.
        """
        path = Path(folder) / PROFILE_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            checksum = content.pop("sha256")
            schema = content["schema"]
        except FileNotFoundError:
            raise ProfileMismatchError(f"no {PROFILE_FILE} in {folder} - make one with `thinkkv patch`") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProfileMismatchError(f"{path} is damaged ({error}) - calibrate again with `thinkkv patch`") from None
        if schema != SCHEMA:
            raise ProfileMismatchError(f"{path} has schema {schema}, this thinkkv reads {SCHEMA} - calibrate again")
        if checksum != _checksum(content):
            raise ProfileMismatchError(f"{path} is damaged (checksum) - calibrate again with `thinkkv patch`")
        missing = {field.name for field in fields(cls)} - content.keys()
        if missing or content["score"] not in SCORES:
            named = ", ".join(sorted(missing)) or "known score"
            raise ProfileMismatchError(f"{path} is damaged (no {named}) - calibrate again with `thinkkv patch`")
        return cls(
            score=content["score"],
            scores=tuple(tuple(row) for row in content["scores"]),
            heterogeneous=tuple(tuple(row) for row in content["heterogeneous"]),
            fingerprint=content["fingerprint"],
            calibration=content["calibration"],
        )


def fingerprint_of(model: nn.Module) -> dict[str, Any]:
    """What tells one model from another: its geometry and the signs of a few key projections.

    Signs are the same in every dtype, and a LoRA adapter that is not merged leaves them alone.
    """
    config: Any = model.config
    shapes = shapes_of(model)
    return {
        "model_type": config.model_type,
        "layers": len(shapes),
        "query_heads": shapes[0].query_heads,
        "kv_heads": shapes[0].kv_heads,
        "head_dim": shapes[0].head_dim,
        "vocabulary": config.vocab_size,
        "weights": _sign_hash(model),
    }


def _sign_hash(model: nn.Module) -> str:
    architecture = architecture_of(model.config)
    attention = attention_modules(architecture, model)
    digest = hashlib.sha256()
    for module in (attention[0], attention[-1]):
        weight: torch.Tensor = getattr(module, architecture.projections.k).weight
        # The sign bit, not a comparison: a weight that float16 rounds to zero keeps it.
        digest.update(weight.detach().flatten()[:4096].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
