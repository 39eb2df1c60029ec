"""Head profiles on disk: whole, of this model, and refused otherwise."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny_models import LAYERS, new_model, prompts
from thinkkv import sdk
from thinkkv.sdk.head_map import draw_head_map
from thinkkv.sdk.policies import POLICIES, RehearsedKV, RetrievalKV, SnapKV, TaskKV
from thinkkv.sdk.profile import fingerprint_of

KV_HEADS = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return new_model("llama", KV_HEADS)


@pytest.fixture(scope="module")
def profile(model: Any) -> sdk.HeadProfile:
    return sdk.HeadProfile(
        score="distance",
        scores=((0.1, 0.2, 0.3, 0.4), (2.5, 1.5, 0.5, 1 / 3), (1.0, 3.0, 2.0, 0.0)),
        heterogeneous=((3,), (0,), (1, 2)),
        fingerprint=fingerprint_of(model),
        calibration={"prompts": 2, "sha256": "0" * 64},
    )


@pytest.fixture
def folder(profile: sdk.HeadProfile, tmp_path: Path) -> Path:
    return profile.save(tmp_path / "profiles" / "math")


class TestFiles:
    """Saving and loading."""

    def test_loading_gives_what_was_saved(self, profile: sdk.HeadProfile, folder: Path) -> None:
        assert sdk.HeadProfile.load(folder) == profile
        assert sdk.HeadProfile.load(str(folder)) == profile

    def test_the_folder_holds_the_profile_and_its_picture_alone(self, folder: Path) -> None:
        assert sorted(path.name for path in folder.iterdir()) == ["heads.png", "profile.json"]
        content = json.loads((folder / "profile.json").read_text())
        assert (content["schema"], content["policy"], content["score"]) == (1, "task-kv", "distance")

    def test_saving_again_replaces_both(self, profile: sdk.HeadProfile, folder: Path) -> None:
        other = replace(profile, heterogeneous=((0,), (1,), (2,)))
        before = (folder / "heads.png").read_bytes()
        other.save(folder)
        assert sdk.HeadProfile.load(folder) == other
        assert (folder / "heads.png").read_bytes() != before

    def test_a_failed_save_leaves_the_old_profile(
        self, profile: sdk.HeadProfile, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full_disk(*args: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.replace", full_disk)
        with pytest.raises(OSError, match="no space left"):
            replace(profile, heterogeneous=((), (), ())).save(folder)
        assert sdk.HeadProfile.load(folder) == profile
        assert sorted(path.name for path in folder.iterdir()) == ["heads.png", "profile.json"]


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the content and correct the checksum: a file that is whole, but not what is expected."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        del content["sha256"]
        change(content)
        checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(content | {"sha256": checksum}))

    return damage


def edited(old: str, new: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "is damaged"),
    "empty": (lambda path: path.write_text(""), "is damaged"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "a list": (lambda path: path.write_text("[1, 2]"), "is damaged"),
    "a string": (lambda path: path.write_text('"profile"'), "is damaged"),
    "a changed score": (edited("2.5", "2.6"), r"is damaged \(checksum\)"),
    "a changed class": (edited("[\n   3\n  ]", "[\n   2\n  ]"), r"is damaged \(checksum\)"),
    "another fingerprint": (edited('"layers": 3', '"layers": 4'), r"is damaged \(checksum\)"),
    "no checksum": (edited('"sha256": "', '"sha": "'), "is damaged"),
    "a missing key": (edited('"scores"', '"sores"'), "is damaged"),
    "a missing key, resealed": (rewritten(lambda content: content.pop("scores")), "is damaged"),
    "no schema": (rewritten(lambda content: content.pop("schema")), "is damaged"),
    "an unknown score, resealed": (rewritten(lambda content: content.update(score="entropy")), "is damaged"),
    "a newer schema": (rewritten(lambda content: content.update(schema=2)), "has schema 2, this thinkkv reads 1"),
    "missing": (lambda path: path.unlink(), "no profile.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_profile_is_refused(damage: str, folder: Path, model: Any) -> None:
    spoil, explanation = DAMAGES[damage]
    spoil(folder / "profile.json")
    with pytest.raises(sdk.ProfileMismatchError, match=explanation):
        sdk.HeadProfile.load(folder)
    with pytest.raises(sdk.ProfileMismatchError):
        sdk.apply(model, profile=folder)
    assert "generate" not in model.__dict__


class TestModel:
    """A profile belongs to one model, in any dtype."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_dtype_does_not_matter(self, profile: sdk.HeadProfile, dtype: torch.dtype) -> None:
        same = new_model("llama", KV_HEADS, dtype)
        with sdk.apply(same, profile=profile) as handle:
            assert handle.policy == TaskKV(head_scores=profile.scores)

    def test_the_smallest_weights_survive_a_change_of_dtype(self, model: Any, profile: sdk.HeadProfile) -> None:
        tiny = new_model("llama", KV_HEADS)
        with torch.no_grad():
            tiny.model.layers[0].self_attn.k_proj.weight[0, :8] = 1e-9
        fingerprint = fingerprint_of(tiny)
        half = tiny.to(torch.float16)
        assert fingerprint_of(half) == fingerprint

    @pytest.mark.parametrize(
        ("variant", "kv_heads", "key"),
        [("qwen2", KV_HEADS, "model_type"), ("llama", 2, "kv_heads"), ("mistral", KV_HEADS, "model_type")],
        ids=["family", "heads", "mistral"],
    )
    def test_another_model_is_refused(self, profile: sdk.HeadProfile, variant: str, kv_heads: int, key: str) -> None:
        with pytest.raises(sdk.ProfileMismatchError, match=f"profile is of another model: {key} is"):
            sdk.apply(new_model(variant, kv_heads), profile=profile)

    @pytest.mark.parametrize("layer", [0, LAYERS - 1], ids=["bottom", "top"])
    def test_other_weights_of_the_same_shape_are_refused(self, profile: sdk.HeadProfile, layer: int) -> None:
        other = new_model("llama", KV_HEADS)
        with torch.no_grad():
            other.model.layers[layer].self_attn.k_proj.weight[0, 0].neg_()
        with pytest.raises(sdk.ProfileMismatchError, match="weights is"):
            sdk.apply(other, profile=profile)

    def test_an_adapter_that_is_not_merged_leaves_the_fingerprint_alone(self, profile: sdk.HeadProfile) -> None:
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(new_model("llama", KV_HEADS), LoraConfig(target_modules=["k_proj"]))
        with sdk.apply(wrapped, profile=profile) as handle:
            assert handle.policy.name == "task-kv"


class TestPolicy:
    """Which policies a profile serves."""

    def test_a_profile_brings_its_policy(self, model: Any, profile: sdk.HeadProfile) -> None:
        with sdk.apply(model, profile=profile) as handle:
            assert handle.policy == TaskKV(head_scores=profile.scores)
        with sdk.apply(model, profile=replace(profile, score="retrieval")) as handle:
            assert handle.policy == RetrievalKV(head_scores=profile.scores)

    def test_a_policys_options_are_kept(self, profile: sdk.HeadProfile) -> None:
        assert profile.fix(TaskKV(sinks=5)) == TaskKV(sinks=5, head_scores=profile.scores)

    @pytest.mark.parametrize("policy", ["retrieval-kv", "evidence-kv", "rehearsed-kv", "reread-kv", "matched-kv"])
    def test_one_retrieval_profile_serves_every_policy_that_ranks_heads(
        self, model: Any, profile: sdk.HeadProfile, policy: str
    ) -> None:
        ranking = replace(profile, score="retrieval")
        with sdk.apply(model, profile=ranking, policy=policy, ratio=0.5) as handle:
            assert handle.policy == POLICIES[policy](head_scores=profile.scores)  # type: ignore[call-arg]
        served = "for retrieval-kv, evidence-kv, rehearsed-kv, reread-kv, matched-kv, not for snapkv"
        with pytest.raises(sdk.ProfileMismatchError, match=served):
            ranking.fix(SnapKV())

    @pytest.mark.parametrize("policy", [SnapKV(), RetrievalKV(), RehearsedKV()], ids=lambda policy: policy.name)
    def test_another_policy_is_told_which_one_it_is_for(
        self, model: Any, profile: sdk.HeadProfile, policy: Any
    ) -> None:
        with pytest.raises(sdk.ProfileMismatchError, match=f"for task-kv, not for {policy.name}"):
            sdk.apply(model, profile=profile, policy=policy)

    def test_classes_are_the_profiles_on_every_prompt(self, model: Any, profile: sdk.HeadProfile) -> None:
        small = TaskKV(sinks=2, recent=8, observation_window=4)
        found = []
        with sdk.apply(model, policy=small, ratio=0.75, profile=profile) as handle:
            for label in ("first", "second", "third"):
                model.generate(prompts([90], label=label).ids, max_new_tokens=2, do_sample=False)
                found.append([layer.heterogeneous for layer in handle.report().layers])
        assert found == [[(3,), (0,), (1,)]] * 3


class TestPicture:
    """The head map."""

    @pytest.mark.parametrize("score", ["distance", "retrieval"])
    def test_it_is_a_picture_with_something_on_it(self, profile: sdk.HeadProfile, score: str) -> None:
        with Image.open(io.BytesIO(draw_head_map(replace(profile, score=score)))) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
            pixels = np.asarray(image.convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
        assert pixels.std() > 20

    def test_full_heads_are_marked_in_red(self, profile: sdk.HeadProfile) -> None:
        def reds(heterogeneous: tuple[tuple[int, ...], ...]) -> int:
            with Image.open(io.BytesIO(draw_head_map(replace(profile, heterogeneous=heterogeneous)))) as image:
                red, green, blue = (np.asarray(image.convert("RGB"))[..., i].astype(int) for i in range(3))
            return int(((red > 240) & (green < 40) & (blue < 40)).sum())

        none, one, four = reds(((), (), ())), reds(((3,), (), ())), reds(((3,), (0,), (1, 2)))
        assert none == 0
        assert four == pytest.approx(4 * one, rel=0.1)
        assert one > 20

    @pytest.mark.parametrize(
        ("layers", "heads", "value"), [(1, 1, 0.0), (64, 2, 1.0), (4, 64, 0.5)], ids=["one", "deep", "wide"]
    )
    def test_any_geometry_can_be_drawn(self, profile: sdk.HeadProfile, layers: int, heads: int, value: float) -> None:
        flat = replace(profile, scores=((value,) * heads,) * layers, heterogeneous=((0,),) * layers)
        assert draw_head_map(flat).startswith(b"\x89PNG")
