"""The character tokenizer of the SDK's tests, a tiny checkpoint that has it, and a builder that is loaded once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.export.baking import profile_of
from tests.export.warm_builder import WarmBuilder
from tests.sdk.conftest import char_tokenizer
from tests.tiny_models import new_model
from thinkkv.export.onnx import builder
from thinkkv.kernels import task_kv_step
from thinkkv.kernels.c_library import NoKernelError

__all__ = ["char_tokenizer"]


@pytest.fixture(scope="module", autouse=True)
def warm_builder() -> Iterator[None]:
    """Benchmarks' tests start the builder as users do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "subprocess", WarmBuilder())
        yield


@pytest.fixture(scope="session")
def library() -> Path:
    """The operators in C, for ONNX Runtime."""
    try:
        return task_kv_step.library()
    except NoKernelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, char_tokenizer: Any) -> Path:
    """A tiny checkpoint with a profile beside it."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    model = new_model("llama", 4)
    model.config.bos_token_id, model.config.eos_token_id = 1, 96
    model.generation_config.eos_token_id = 96
    model.save_pretrained(folder)
    char_tokenizer.save_pretrained(folder)
    profile_of(model).save(folder.parent / "profile")
    return folder
