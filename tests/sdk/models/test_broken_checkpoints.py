"""What is said of a checkpoint that is damaged or incomplete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.sdk.models.tiny_checkpoints import (
    pickled,
)
from thinkkv import sdk
from thinkkv.sdk.model_sources import resolve


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def written(file: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_text(text)

    return damage


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def shard_lost(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(without("config.json"), "is no checkpoint (no config.json) - name the folder", id="no-config"),
        pytest.param(adapter, "is an adapter and no checkpoint - merge it", id="adapter"),
        pytest.param(written("config.json", "{"), "has a damaged config.json - copy", id="damaged-config"),
        pytest.param(written("config.json", "[1]"), "has a damaged config.json - copy", id="config-of-nothing"),
        pytest.param(without("model.safetensors"), "has no safetensors weights - put model", id="no-weights"),
        pytest.param(pickled, "has only pickled weights (pytorch_model.bin)", id="pickle-only"),
        pytest.param(shard_lost, "is incomplete, model-00001-of-00002.safetensors is missing", id="shard-lost"),
        pytest.param(no_tokenizer, "has no tokenizer - put tokenizer.json", id="no-tokenizer"),
    ],
)
def test_a_broken_folder_is_refused_at_a_glance(checkpoint: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(checkpoint)
    with pytest.raises(sdk.ModelNotFoundError) as raised:
        resolve(checkpoint)
    assert str(raised.value).startswith(f"{checkpoint} {said}")


def test_a_folder_around_a_gguf_file_names_it(pristine_gguf: Path) -> None:
    with pytest.raises(sdk.ModelNotFoundError, match=r"name the GGUF file in it, tiny\.gguf"):
        resolve(pristine_gguf.parent)


def test_a_file_that_is_no_gguf_is_refused(checkpoint: Path) -> None:
    with pytest.raises(sdk.ModelNotFoundError, match="is no GGUF file - name a checkpoint folder"):
        resolve(checkpoint / "model.safetensors")


def test_cut_off_weights_are_refused(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(sdk.ModelNotFoundError, match=r"cannot be loaded .* - check its files"):
        sdk.load(checkpoint)


def test_weights_of_another_shape_are_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(sdk.ModelNotFoundError, match=r"cannot be loaded .* - check its files"):
        sdk.load(checkpoint)


def test_weights_that_lack_a_tensor_are_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(sdk.ModelNotFoundError, match=r"lacks 1 of its weights \(model\.layers\.1\.mlp\.up_proj"):
        sdk.load(checkpoint)


def test_code_of_a_checkpoint_is_not_run(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(sdk.UnsupportedModelError, match="without running its code"):
        sdk.load(checkpoint)


@pytest.mark.parametrize("share", [0.0002, 0.05, 0.5, 0.99], ids=lambda share: f"first-{share:.2%}")
def test_a_cut_off_gguf_file_is_refused(pristine_gguf: Path, share: float, tmp_path: Path) -> None:
    whole = pristine_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(sdk.ModelNotFoundError, match="it is damaged, cut off or") as raised:
        sdk.load(path)
    assert "\n" not in str(raised.value)
