"""The script of docs/export.md says what ``thinkkv`` says, in an interpreter that loads nothing of ``thinkkv``."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.export.baking import profile_of
from tests.tiny_models import VOCABULARY, new_model
from thinkkv.export.bake import bake
from thinkkv.export.onnx.generate import GENAI_FILE, settings_of
from thinkkv.export.onnx.session import Session
from thinkkv.export.onnx.tokenizer import BundleTokenizer
from thinkkv.export.onnx.write import write_onnx
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.policies import TaskKV

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
POLICY = TaskKV(sinks=4, recent=10, observation_window=8, beta=0.5, pooling=5)
CONTEXT = 160
NEW_TOKENS = 200
"""As many as the script generates at most, in each turn."""
LOADED_NOTHING_ELSE = """
loaded = {name.partition(".")[0] for name in sys.modules}
assert "onnxruntime_genai" in loaded and not loaded & {"thinkkv", "torch", "transformers", "onnxruntime"}, loaded
"""
END = VOCABULARY - 1
QUESTIONS = {
    "both short": ("Why is the sky blue?", "And at dusk?"),
    "a long first": ("Why is the sky blue? " * 8, "And at dusk?"),
    "a long second": ("Why?", "And is it blue at dusk, too? " * 8),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose every token is a text of its own, so that equal texts are equal tokens."""
    model = new_model("llama", 4)
    model.config.max_position_embeddings = 4096
    model.config.bos_token_id, model.config.eos_token_id = 1, END
    torch.nn.init.zeros_(model.lm_head.weight.data[END])  # a logit of zero is never the largest: no text ends early
    profile, budget = profile_of(model), Budget(ratio=0.5)
    baked = bake(model, byte_tokenizer(), policy=POLICY, budget=budget, profile=profile, context=CONTEXT)
    folder = tmp_path_factory.mktemp("bundle")
    write_onnx(baked, folder)
    return folder


def byte_tokenizer() -> Any:
    """Printable ASCII, blank and new line, in the form that onnxruntime-genai's tokenizer reads; and an end token."""
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    assert len(characters) == END
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def script() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if "import onnxruntime_genai" in block]
    return found


def run_script(folder: Path, questions: tuple[str, ...]) -> str:
    """What the script prints, isolated from the environment and from the folder that it is started in."""
    command = [sys.executable, "-I", "-c", script() + LOADED_NOTHING_ELSE, str(folder), *questions]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_plain_onnxruntime(folder: Path, questions: tuple[str, ...]) -> list[list[int]]:
    """The tokens of every turn by ``thinkkv``'s own session."""
    config, slots = settings_of(folder)
    tokenizer = BundleTokenizer(folder)
    conversation = Session(folder, threads=1).start(4096, slots)
    turns: list[list[int]] = []
    for question in questions:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(prompt, chat=False)
        last = turns[-1][-1:] if turns else []
        turns.append(list(conversation.greedy([*last, *ids], NEW_TOKENS, {config["eos_token_id"]})))
    return turns


def text_of(folder: Path, turns: list[list[int]]) -> str:
    return "".join(BundleTokenizer(folder).decode(turn) + "\n" for turn in turns)


@pytest.mark.parametrize("case", QUESTIONS)
def test_the_script_says_what_plain_onnxruntime_says(bundle: Path, case: str) -> None:
    turns = in_plain_onnxruntime(bundle, QUESTIONS[case])
    assert [len(turn) for turn in turns] == [NEW_TOKENS, NEW_TOKENS]
    assert run_script(bundle, QUESTIONS[case]) == text_of(bundle, turns)


def test_a_turn_that_ends_by_itself(bundle: Path, tmp_path: Path) -> None:
    """The end token comes back at the start of the next turn, as any other last token."""
    questions = QUESTIONS["both short"]
    never = in_plain_onnxruntime(bundle, questions)[0]
    end = next(token for i, token in enumerate(never) if i >= 10 and token not in never[:i])
    folder = shutil.copytree(bundle, tmp_path / "ends")
    settings = json.loads((folder / GENAI_FILE).read_text())
    settings["model"]["eos_token_id"] = end
    (folder / GENAI_FILE).write_text(json.dumps(settings))
    turns = in_plain_onnxruntime(folder, questions)
    assert turns[0] == never[: never.index(end) + 1]
    assert run_script(folder, questions) == text_of(folder, turns)
