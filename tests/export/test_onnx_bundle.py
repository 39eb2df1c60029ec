"""A bundle in plain ONNX Runtime and in onnxruntime-genai generates what PyTorch does with the same keep rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai
import pytest
import torch

from tests.export.baking import profile_of
from tests.tiny_models import VOCABULARY, new_model, prompts
from thinkkv.export.bake import Baked, bake
from thinkkv.export.onnx import cursor
from thinkkv.export.onnx.generate import generate_bundle
from thinkkv.export.onnx.options import OnnxOptions
from thinkkv.export.onnx.session import Session
from thinkkv.export.onnx.slots import Slots
from thinkkv.export.onnx.torch_path import greedy_tokens
from thinkkv.export.onnx.write import slots_of, write_onnx
from thinkkv.patches.errors import ExportError, UnsupportedGenerationError
from thinkkv.sdk.budget import Budget
from thinkkv.sdk.policies import Full, Policy, RetrievalKV, TaskKV

SMALL = TaskKV(sinks=4, recent=10, observation_window=8, beta=0.5, pooling=5)
RETRIEVAL = RetrievalKV(sinks=4, recent=10, observation_window=8, pooling=5, share=0.5)
"""With the profile below all heads of the first layer are full, some of the others'."""
CONTEXT = 160
PROMPTS = (5, 31, 150)
"""Prompts that fit the slots, and longer ones."""


@dataclass(frozen=True)
class Bundle:
    baked: Baked
    folder: Path

    @property
    def slots(self) -> Slots | None:
        return slots_of(self.baked.block)

    def torch_tokens(self, ids: list[int], new: int) -> list[int]:
        return greedy_tokens(self.baked.model, ids, new, self.slots, self.baked.block.layers, set())


Make = Callable[..., Bundle]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, char_tokenizer: Any) -> Make:
    """Bundles of tiny models, each written once."""
    made: dict[tuple[Any, ...], Bundle] = {}

    def build(family: str, kv_heads: int = 4, policy: Policy = SMALL, ratio: float = 0.5, **options: Any) -> Bundle:
        key = (family, kv_heads, policy, ratio, *options.items())
        if key not in made:
            model = new_model(family, kv_heads)
            # The builder wants these. No text ends early: a logit of zero is never the largest.
            model.config.bos_token_id, model.config.eos_token_id = 1, VOCABULARY - 1
            torch.nn.init.zeros_(model.lm_head.weight.data[VOCABULARY - 1])
            profile = _profile(model, policy)
            budget = Budget(ratio=1.0 if isinstance(policy, Full) else ratio)
            baked = bake(model, char_tokenizer, policy=policy, budget=budget, profile=profile, context=CONTEXT)
            folder = tmp_path_factory.mktemp("bundle")
            write_onnx(baked, folder, **options)
            made[key] = Bundle(baked, folder)
        return made[key]

    return build


def _profile(model: Any, policy: Policy) -> Any:
    if isinstance(policy, Full):
        return None
    if isinstance(policy, RetrievalKV):
        return profile_of(model, score="retrieval", best_layer=0)
    return profile_of(model)


def runtime_tokens(bundle: Bundle, ids: list[int], new: int, native: bool = False) -> list[int]:
    conversation = Session(bundle.folder, threads=1, native=native).start(len(ids) + new, bundle.slots)
    return list(conversation.greedy(ids, new, set()))


def genai_tokens(
    bundle: Bundle, turns: list[list[int]], new: int, max_length: int, library: Path | None = None
) -> list[int]:
    """What stock onnxruntime-genai generates after these turns."""
    generator = onnxruntime_genai.Generator(*genai_model(bundle, max_length, library))
    for turn in turns:
        generator.append_tokens(np.array(turn, dtype=np.int32))
    return genai_continue(generator, new)


def genai_model(bundle: Bundle, max_length: int, library: Path | None = None) -> tuple[Any, Any]:
    """A bundle, loaded, and the options of greedy search."""
    config = onnxruntime_genai.Config(str(bundle.folder))
    if library:
        shutil.copy(library, bundle.folder)  # the runtime wants it there
        options = {"custom_ops_library": library.name}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=max_length, do_sample=False)
    return model, parameters


def genai_continue(generator: Any, new: int) -> list[int]:
    tokens = []
    for _ in range(new):
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def prompt(tokens: int) -> list[int]:
    return prompts((tokens,)).ids[0].tolist()


CASES = {
    "llama3": ("llama3", 4, SMALL, 0.5),
    "qwen2, none full": ("qwen2", 4, SMALL, 0.2),
    "qwen3, a layer all full": ("qwen3", 4, RETRIEVAL, 0.8),
    "mistral, multi-head": ("mistral", 8, SMALL, 0.5),
    "llama, one KV head": ("llama", 1, SMALL, 0.25),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_pytorch(make: Make, case: str) -> None:
    bundle = make(*CASES[case])
    for tokens in PROMPTS:
        expected = bundle.torch_tokens(prompt(tokens), 60)
        assert runtime_tokens(bundle, prompt(tokens), 60) == expected
        assert genai_tokens(bundle, [prompt(tokens)], 60, tokens + 60) == expected
        assert genai_tokens(bundle, [prompt(tokens)], 60, 400) == expected  # room for more: other buffers


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_pytorch_with_operators_in_c(make: Make, case: str, library: Path) -> None:
    bundle = make(*CASES[case])
    for tokens in PROMPTS:
        expected = bundle.torch_tokens(prompt(tokens), 60)
        assert runtime_tokens(bundle, prompt(tokens), 60, native=True) == expected
        assert genai_tokens(bundle, [prompt(tokens)], 60, 400, library) == expected


@pytest.mark.parametrize("case", [("llama3", 4, SMALL, 0.6), ("qwen3", 4, RETRIEVAL, 0.7)])
def test_tokens_equal_pytorch_where_matrix_products_serve(
    make: Make, case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "LONG", 16)  # tiny models know no long texts
    bundle = make(*case)
    for tokens in PROMPTS:
        expected = bundle.torch_tokens(prompt(tokens), 60)
        assert runtime_tokens(bundle, prompt(tokens), 60) == expected
        assert genai_tokens(bundle, [prompt(tokens)], 60, 2 * tokens + 60) == expected  # begins to serve on the way


def test_the_cases_are_what_they_say(make: Make) -> None:
    full = {case: [layer.full for layer in make(*CASES[case]).baked.block.layers] for case in CASES}
    assert full["qwen2, none full"] == full["llama, one KV head"] == [0, 0, 0]
    assert full["qwen3, a layer all full"][0] == 4
    assert any(0 < heads < 4 for heads in full["qwen3, a layer all full"])
    assert all(0 < heads < 4 for heads in full["llama3"])


def test_full_slots_make_no_difference(make: Make) -> None:
    """A prompt that fits, with all that follows: the dense model's tokens."""
    bundle = make("llama3", 4, SMALL, 0.5)
    ids = prompt(20)
    new = bundle.slots.capacity - len(ids) if bundle.slots else 0
    assert new > 10
    with torch.inference_mode():
        dense = bundle.baked.model.generate(
            torch.tensor([ids]), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None
        )
    assert runtime_tokens(bundle, ids, new) == dense[0, len(ids) :].tolist()


@pytest.mark.parametrize("lengths", [(100, 7), (20, 120), (20, 5)])
def test_a_second_turn(make: Make, lengths: tuple[int, int]) -> None:
    bundle = make("llama3", 4, SMALL, 0.5)
    first, second = prompt(lengths[0]), prompt(lengths[1])
    conversation = Session(bundle.folder, threads=1).start(400, bundle.slots)
    conversation.feed(first)
    tokens = list(conversation.greedy(second, 20, set()))
    assert tokens == genai_tokens(bundle, [first, second], 20, 400)


def test_a_turn_after_generated_tokens(make: Make) -> None:
    """While all fits, the dense model's tokens."""
    bundle = make("llama3", 4, SMALL, 0.5)
    first, second = prompt(15), prompt(9)
    conversation = Session(bundle.folder, threads=1).start(400, bundle.slots)
    tokens = list(conversation.greedy(first, 10, set()))
    ids = [*first, *tokens, *second]
    with torch.inference_mode():
        dense = bundle.baked.model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert list(conversation.greedy([tokens[-1], *second], 10, set())) == dense[0, len(ids) :].tolist()


@pytest.mark.parametrize("lengths", [(15, 9), (100, 7), (20, 120)], ids=["all fits", "long first", "long second"])
def test_a_turn_after_generated_tokens_in_onnxruntime_genai(make: Make, lengths: tuple[int, int]) -> None:
    """As docs/export.md has it: the token that the runtime did not feed comes back as the turn's first."""
    bundle = make("llama3", 4, SMALL, 0.5)
    first, second = prompt(lengths[0]), prompt(lengths[1])
    generator = onnxruntime_genai.Generator(*genai_model(bundle, 400))
    generator.append_tokens(np.array(first, dtype=np.int32))
    tokens = genai_continue(generator, 10)
    generator.rewind_to(generator.token_count() - 1)
    generator.append_tokens(np.array([tokens[-1], *second], dtype=np.int32))
    found = genai_continue(generator, 10)
    conversation = Session(bundle.folder, threads=1).start(400, bundle.slots)
    assert list(conversation.greedy(first, 10, set())) == tokens == bundle.torch_tokens(first, 10)
    assert list(conversation.greedy([tokens[-1], *second], 10, set())) == found
    if bundle.slots and sum(lengths) + 20 <= bundle.slots.capacity:
        assert bundle.torch_tokens([*first, *tokens, *second], 10) == found


def test_logits_stay_what_they_are_when_more_is_fed(make: Make) -> None:
    bundle = make("llama3", 4, SMALL, 0.5)
    conversation = Session(bundle.folder, threads=1).start(60, bundle.slots)
    kept = [conversation.feed([token]) for token in prompt(8)]
    again = Session(bundle.folder, threads=1).start(60, bundle.slots)
    for logits, token in zip(kept, prompt(8), strict=True):
        assert np.array_equal(logits, again.feed([token]))


def test_the_bounded_cache_is_really_smaller(make: Make) -> None:
    bundle = make("llama3", 4, SMALL, 0.5)
    conversation = Session(bundle.folder, threads=1).start(CONTEXT, bundle.slots)
    conversation.feed(prompt(CONTEXT))
    held = conversation.bytes
    assert held["full"] == 3 * 4 * CONTEXT * 16 * 2 * 4
    assert held["used"] <= held["physical"] <= 0.5 * held["full"]
    kept = bundle.slots.in_use(CONTEXT) if bundle.slots else 0
    rows = [CONTEXT * layer.full + kept * (4 - layer.full) for layer in bundle.baked.block.layers]
    assert held["used"] == held["planned"] == sum(rows) * 16 * 2 * 4
    slots = bundle.slots.capacity if bundle.slots else 0
    rows = [CONTEXT * layer.full + slots * (4 - layer.full) for layer in bundle.baked.block.layers]
    assert held["promised"] == sum(rows) * 16 * 2 * 4 <= 0.5 * held["full"]


def test_a_short_text_is_promised_whole(make: Make) -> None:
    bundle = make("llama3", 4, SMALL, 0.5)
    conversation = Session(bundle.folder, threads=1).start(CONTEXT, bundle.slots)
    conversation.feed(prompt(bundle.slots.capacity if bundle.slots else 0))
    assert conversation.bytes["used"] == conversation.bytes["promised"] == conversation.bytes["full"]


def test_a_conversation_that_is_too_long_is_refused(make: Make) -> None:
    bundle = make("llama3", 4, SMALL, 0.5)
    conversation = Session(bundle.folder, threads=1).start(50, bundle.slots)
    with pytest.raises(ExportError, match="51 tokens do not fit"):
        conversation.feed(prompt(51))


def test_batches_are_refused_by_name(make: Make) -> None:
    bundle = make("llama3", 4, SMALL, 0.5)
    conversation = Session(bundle.folder, threads=1).start(50, bundle.slots)
    with pytest.raises(UnsupportedGenerationError, match="one sequence at a time, this is a batch of 2") as refused:
        conversation.feed([prompt(9), prompt(7)])
    assert len(str(refused.value).splitlines()) == 1
    assert conversation.seen == 0
    with pytest.raises(UnsupportedGenerationError, match="this is a batch of 3"):
        generate_bundle(bundle.folder, ["a", "b", "c"])


def test_the_runtime_refuses_a_batch_by_the_name_of_its_input(make: Make) -> None:
    bundle = make("llama3", 4, SMALL, 0.5)
    model = onnxruntime_genai.Model(str(bundle.folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=100, batch_size=2)
    with pytest.raises(Exception, match=r"input_ids .*\n.* Got: 2 Expected: 1"):
        onnxruntime_genai.Generator(model, parameters).append_tokens(np.array([prompt(9), prompt(9)], dtype=np.int32))
    graph = onnx.load(bundle.folder / "model.onnx", load_external_data=False).graph
    assert {value.type.tensor_type.shape.dim[0].dim_value for value in graph.input} == {1}
    values = (*graph.input, *graph.value_info, *graph.output)
    assert "batch_size" not in {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim}


@pytest.mark.parametrize("case", CASES)
def test_bundles_carry_the_operators_that_they_use(make: Make, case: str) -> None:
    model = onnx.load(make(*CASES[case]).folder / "model.onnx", load_external_data=False)
    defined = {(function.domain, function.name, function.overload) for function in model.functions}
    used = {(node.domain, node.op_type, node.overload) for node in model.graph.node if node.domain == "ai.thinkkv"}
    assert used <= defined


def test_gate_and_up_projections_are_one_product(make: Make) -> None:
    bundle = make(*CASES["llama3"])
    names = [node.name for node in onnx.load(bundle.folder / "model.onnx", load_external_data=False).graph.node]
    layers = len(bundle.baked.block.layers)
    assert sum("gate_up_proj/MatMul" in name for name in names) == layers
    assert not any("/gate_proj/" in name or "/up_proj/" in name for name in names)


def test_further_builder_options_reach_the_builder(make: Make) -> None:
    bundle = make("llama3", 4, SMALL, 0.5, quantize="int4", options=OnnxOptions(builder_options=("block_size=16",)))
    nodes = onnx.load(bundle.folder / "model.onnx", load_external_data=False).graph.node
    sizes = [onnx.helper.get_node_attr_value(node, "block_size") for node in nodes if node.op_type == "MatMulNBits"]
    assert sizes
    assert set(sizes) == {16}
    assert json.loads((bundle.folder / "thinkkv.json").read_text())["onnx"]["builder_options"] == ["block_size=16"]


@pytest.mark.parametrize("quantize", ["int4", pytest.param("int8", marks=pytest.mark.slow)])
def test_quantized_weights_give_the_dense_graphs_tokens_while_everything_fits(make: Make, quantize: str) -> None:
    ours = make("llama3", 4, SMALL, 0.5, quantize=quantize)
    dense = make("llama3", 4, Full(), 1.0, quantize=quantize)
    assert json.loads((ours.folder / "thinkkv.json").read_text())["onnx"]["quantize"] == quantize
    assert runtime_tokens(ours, prompt(30), 20) == runtime_tokens(dense, prompt(30), 20)


def test_sliding_windows_are_refused(make: Make) -> None:
    with pytest.raises(ExportError, match="sliding window"):
        make("mistral-window", 4, Full())


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["cuda", "webgpu"])
def test_graphs_for_gpus_are_sound(make: Make, provider: str) -> None:
    """Not run here: every value is made before it is used, the caches are float16 and sized by the window alone."""
    bundle = make("llama3", 4, SMALL, 0.5, options=OnnxOptions(provider))
    model = onnx.load(bundle.folder / "model.onnx")
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    for node in model.graph.node:
        assert set(node.input) <= known
        assert not set(node.output) - {""} & known
        known |= set(node.output)
    assert {value.name for value in model.graph.output} <= known
    caches = [value for value in model.graph.input if value.name.startswith("past_key_values.")]
    assert {value.type.tensor_type.elem_type for value in caches} == {onnx.TensorProto.FLOAT16}
    assert [node.op_type for node in model.graph.node].count("TaskKVAttention") == 3
    settings = json.loads((bundle.folder / "genai_config.json").read_text())["model"]["decoder"]
    assert settings["sliding_window"]["window_size"] == (bundle.slots.capacity if bundle.slots else None)
    assert settings["session_options"]["provider_options"]
