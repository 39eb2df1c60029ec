"""A cache from a file goes on as the one that was saved would have, in every family and with every policy."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from tests.conformance.decoding import Conversation, random_chunk, random_tokens
from tests.conformance.small_policies import NAMES, small_policy
from tests.saved_files import rewrite
from tests.tiny_models import KV_HEADS, VARIANTS, Batch, Case, new_model
from thinkkv import sdk
from thinkkv.patches.errors import SavedCacheError
from thinkkv.sdk import bounded
from thinkkv.sdk.policies import CacheDtype, SnapKV
from thinkkv.sdk.saved_cache import about_cache


@given(data=st.data())
def test_it_goes_on_where_it_was_saved(data: st.DataObject) -> None:
    """After a prompt and perhaps some turns, bit for bit, with what it reports."""
    rows = data.draw(st.integers(1, 3))
    case = Case(
        data.draw(st.sampled_from(sorted(VARIANTS))),
        data.draw(st.sampled_from(KV_HEADS)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        tuple(data.draw(st.lists(st.integers(20, 70), min_size=rows, max_size=rows))),
    )
    small: Any = small_policy(data.draw(st.sampled_from(NAMES)), case.kv_heads)
    policy = replace(small, cache_dtype=data.draw(st.sampled_from(get_args(CacheDtype))))
    before = random_tokens(rows, 3, seed=1) if data.draw(st.booleans()) else []
    widths = data.draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    after = [*random_tokens(rows, 3, seed=2), random_chunk(widths, width=9, seed=3), *random_tokens(rows, 2, seed=4)]
    forgotten = data.draw(st.sampled_from([0, 0, 1, 2]))
    check_against_unsaved(case, before, after, forgotten=forgotten, policy=policy, ratio=0.5)


@pytest.mark.parametrize("variant", ["llama", "qwen2-mixed"])
def test_bounded_rows_are_cut_back_by_the_queries_of_before(variant: str) -> None:
    case = Case(variant, kv_heads=2, lengths=(63, 41))
    before = [random_chunk((30, 30), seed=1), *random_tokens(2, bounded.SEGMENT - 34, seed=2)]
    after = random_tokens(2, bounded.SEGMENT + 4, seed=3)
    check_against_unsaved(case, before, after, policy=small_policy("task-kv", 2), ratio=0.5, decode="bounded")


def check_against_unsaved(
    case: Case, before: Sequence[Batch], after: Sequence[Batch], *, forgotten: int = 0, **patch: Any
) -> None:
    """Of two caches that have read the same, one goes on from a file, perhaps with its last tokens forgotten."""
    with sdk.apply(case.model(), **patch) as handle:
        straight = Conversation(case.model(), handle.new_cache())
        straight.feed_all([case.batch(), *before])
        with tempfile.TemporaryDirectory() as folder:
            path = handle.save_cache(Path(folder, "text.safetensors"), straight.cache)
            resumed = straight.on(handle.load_cache(path))
        croppable = [min(layer.croppable for layer in one.cache.layers) for one in (resumed, straight)]
        assert croppable[0] == croppable[1]
        if forgotten := min(forgotten, croppable[0]):
            straight.crop(forgotten)
            resumed.crop(forgotten)
        assert resumed.cache.kept_positions() == straight.cache.kept_positions()
        assert without_spare(handle.report(resumed.cache)) == without_spare(handle.report(straight.cache))
        assert torch.equal(resumed.feed_all(after), straight.feed_all(after))
        assert without_spare(handle.report(resumed.cache)) == without_spare(handle.report(straight.cache))


def without_spare(report: sdk.Report) -> sdk.Report:
    """Spare capacity depends on how the cache has grown."""
    layers = tuple(replace(layer, physical=0) for layer in report.layers)
    return replace(report, bytes=replace(report.bytes, physical=0), layers=layers)


@pytest.fixture
def case() -> Case:
    return Case("llama", kv_heads=2)


@pytest.fixture
def saved(case: Case, tmp_path: Path) -> Path:
    """A saved cache of the case's prompt."""
    with sdk.apply(case.model(), policy=small_policy("task-kv", 2), ratio=0.5) as handle:
        cache = handle.new_cache()
        Conversation(case.model(), cache).feed(case.batch())
        return handle.save_cache(tmp_path / "text.safetensors", cache, {"text": "a b", "raw": True})


def test_any_patch_may_load_it_and_it_keeps_its_own_decision(case: Case, saved: Path) -> None:
    with sdk.apply(case.model(), policy="full") as handle:
        cache = handle.load_cache(saved)
        assert handle.report().policy == cache.compression.policy.name == "task-kv"
        assert cache.compression.policy == small_policy("task-kv", 2)
        assert cache.compression.budget.ratio == 0.5
        step = random_tokens(1, 1)[0]
        with torch.inference_mode():
            found = case.model()(step.ids, past_key_values=cache, use_cache=True).logits
    with sdk.apply(case.model(), policy=small_policy("task-kv", 2), ratio=0.5) as handle:
        conversation = Conversation(case.model(), handle.new_cache())
        conversation.feed(case.batch())
        assert torch.equal(found, conversation.feed(step))


def test_generate_goes_on_with_it(case: Case, saved: Path) -> None:
    prompt = case.batch().ids
    longer = torch.cat([prompt, torch.tensor([[5, 7, 11]])], dim=1)
    with sdk.apply(case.model(), policy=small_policy("task-kv", 2), ratio=0.5) as handle:
        cache = handle.new_cache()
        Conversation(case.model(), cache).feed(case.batch())
        greedily = {"max_new_tokens": 8, "do_sample": False}
        expected = case.model().generate(longer, past_key_values=cache, **greedily)
        found = case.model().generate(longer, past_key_values=handle.load_cache(saved), **greedily)
    assert torch.equal(found, expected)


def test_what_the_caller_said_is_given_back(saved: Path) -> None:
    assert about_cache(saved) == {"text": "a b", "raw": True}


def test_a_file_takes_the_bytes_that_are_used(case: Case, saved: Path) -> None:
    with sdk.apply(case.model(), policy="full") as handle:
        used = handle.report(handle.load_cache(saved)).bytes.used
    assert used < saved.stat().st_size < used + 20_000


class TestRefusals:
    def test_an_empty_cache(self, case: Case, tmp_path: Path) -> None:
        with sdk.apply(case.model()) as handle, pytest.raises(SavedCacheError, match="nothing to save"):
            handle.save_cache(tmp_path / "text.safetensors", handle.new_cache())

    def test_a_policy_that_no_other_process_knows(self, case: Case, tmp_path: Path) -> None:
        @dataclass(frozen=True)
        class Mine(SnapKV):
            name: ClassVar[str] = "mine"

        with sdk.apply(case.model(), policy=Mine(observation_window=4)) as handle:
            cache = handle.new_cache()
            Conversation(case.model(), cache).feed(case.batch())
            with pytest.raises(SavedCacheError, match="Mine"):
                handle.save_cache(tmp_path / "text.safetensors", cache)
        assert not list(tmp_path.iterdir())

    def test_another_model(self, saved: Path) -> None:
        with sdk.apply(new_model("llama", 4)) as handle, pytest.raises(SavedCacheError, match="of another model"):
            handle.load_cache(saved)

    def test_another_fine_tune_of_the_same_model(self, saved: Path) -> None:
        model = new_model("llama", 2)
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight.mul_(1.01)
        with sdk.apply(model) as handle, pytest.raises(SavedCacheError, match="of another model"):
            handle.load_cache(saved)

    def test_an_adapter_on_the_same_model(self, saved: Path) -> None:
        model = get_peft_model(new_model("llama", 2), LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
        with sdk.apply(model) as handle, pytest.raises(SavedCacheError, match="of another model"):
            handle.load_cache(saved)

    def test_another_dtype(self, saved: Path) -> None:
        with (
            sdk.apply(new_model("llama", 2, torch.bfloat16)) as handle,
            pytest.raises(SavedCacheError, match=r"float32.*bfloat16"),
        ):
            handle.load_cache(saved)

    def test_no_file(self, case: Case, tmp_path: Path) -> None:
        with sdk.apply(case.model()) as handle, pytest.raises(SavedCacheError, match="no file"):
            handle.load_cache(tmp_path / "text.safetensors")

    def test_a_newer_file(self, case: Case, saved: Path) -> None:
        rewrite(saved, lambda header: header | {"schema": 2})
        with sdk.apply(case.model()) as handle, pytest.raises(SavedCacheError, match="upgrade"):
            handle.load_cache(saved)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
    def test_a_file_that_was_cut_off(self, case: Case, saved: Path, share: float) -> None:
        content = saved.read_bytes()
        saved.write_bytes(content[: int(share * len(content))])
        with sdk.apply(case.model()) as handle, pytest.raises(SavedCacheError, match="damaged"):
            handle.load_cache(saved)

    @pytest.mark.parametrize("missing", ["schema", "policy", "plans", "fingerprint", "seen"])
    def test_a_file_of_something_else(self, case: Case, saved: Path, missing: str) -> None:
        rewrite(saved, lambda header: {name: value for name, value in header.items() if name != missing})
        with sdk.apply(case.model()) as handle, pytest.raises(SavedCacheError, match="damaged"):
            handle.load_cache(saved)

    def test_no_place_for_it(self, case: Case, tmp_path: Path) -> None:
        with sdk.apply(case.model()) as handle:
            cache = handle.new_cache()
            Conversation(case.model(), cache).feed(case.batch())
            with pytest.raises(SavedCacheError, match="cannot write"):
                handle.save_cache(tmp_path / "no folder" / "text.safetensors", cache)

    def test_a_file_that_is_there_stays_whole_where_the_new_one_fails(
        self, case: Case, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        content = saved.read_bytes()

        def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("thinkkv.sdk.saved_cache.save_file", full_disk)
        with sdk.apply(case.model()) as handle:
            cache = handle.load_cache(saved)
            with pytest.raises(SavedCacheError, match="No space left on device"):
                handle.save_cache(saved, cache)
        assert saved.read_bytes() == content
        assert list(saved.parent.iterdir()) == [saved]
