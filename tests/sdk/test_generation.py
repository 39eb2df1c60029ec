"""``generate`` as users know it, and every mode that is refused by its name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer, pipeline
from transformers.generation.streamers import BaseStreamer

from tests.sdk.continuation import SMALL_EVIDENCE_KV, SMALL_REHEARSED_KV, SMALL_TASK_KV
from tests.tiny_models import VOCABULARY, new_model, prompts
from thinkkv import sdk
from thinkkv.sdk.policies import KVzip, Policy, PyramidKV, SnapKV

FULL_BUDGETS: list[tuple[str | Policy, float | None]] = [("full", None), (SMALL_TASK_KV, 1.0), ("snapkv", 1.0)]
NAMES = ["full", "task-kv-ratio1", "snapkv-ratio1"]


class Recorder(BaseStreamer):
    """A streamer that notes what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize(("policy", "ratio"), FULL_BUDGETS, ids=NAMES)
class TestFullBudget:
    """With everything kept, the tokens are the stock model's."""

    @pytest.mark.parametrize("variant", ["llama3", "qwen2-mixed", "qwen3", "mistral-window"])
    def test_greedy(self, policy: Any, ratio: float | None, variant: str, ids: torch.Tensor) -> None:
        model = new_model(variant, 4)
        stock = model.generate(ids, max_new_tokens=24, do_sample=False)
        with sdk.apply(model, policy=policy, ratio=ratio):
            assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False), stock)

    def test_sampling_with_a_seed(self, policy: Any, ratio: float | None, model: Any, ids: torch.Tensor) -> None:
        options = {"max_new_tokens": 24, "do_sample": True, "temperature": 1.5, "top_p": 0.95}
        torch.manual_seed(5)
        stock = model.generate(ids, **options)
        with sdk.apply(model, policy=policy, ratio=ratio):
            torch.manual_seed(5)
            assert torch.equal(model.generate(ids, **options), stock)
            assert not torch.equal(model.generate(ids, **options), stock)

    def test_several_samples_of_padded_prompts(self, policy: Any, ratio: float | None, model: Any) -> None:
        batch = prompts([60, 41])
        options = {"attention_mask": batch.mask, "max_new_tokens": 12, "do_sample": True, "num_return_sequences": 3}
        torch.manual_seed(5)
        stock = model.generate(batch.ids, **options)
        with sdk.apply(model, policy=policy, ratio=ratio):
            torch.manual_seed(5)
            assert torch.equal(model.generate(batch.ids, **options), stock)
        assert stock.shape[0] == 6


class TestOutputs:
    """The ways to receive the tokens."""

    def test_a_streamer_gets_the_prompt_and_every_token(self, model: Any, ids: torch.Tensor) -> None:
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75):
            streamer = Recorder()
            out = model.generate(ids, max_new_tokens=10, do_sample=False, streamer=streamer)
        assert streamer.tokens == out[0].tolist()
        assert streamer.ended

    def test_a_text_streamer_can_be_iterated(self, model: Any, char_tokenizer: Any) -> None:
        inputs = char_tokenizer("Where is the treasure? " * 4, return_tensors="pt")
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75):
            streamer = TextIteratorStreamer(char_tokenizer, skip_prompt=True)
            out = model.generate(input_ids=inputs.input_ids, max_new_tokens=10, do_sample=False, streamer=streamer)
        assert "".join(streamer) == char_tokenizer.decode(out[0, inputs.input_ids.shape[1] :])

    def test_a_dictionary_carries_the_cache_and_equal_logits(self, model: Any, ids: torch.Tensor) -> None:
        options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        stock = model.generate(ids, **options)
        with sdk.apply(model, policy="full") as handle:
            out = model.generate(ids, **options)
            assert isinstance(out.past_key_values, sdk.HeterogeneousCache)
            assert handle.report(out.past_key_values) == handle.report()
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(stock.logits), rtol=1e-4, atol=1e-4)

    def test_a_generation_config_object_counts(self, model: Any, ids: torch.Tensor) -> None:
        config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
        with sdk.apply(model, policy="full") as handle:
            assert model.generate(ids, generation_config=config).shape == (1, 95)
            assert model.generate(ids, config).shape == (1, 95)
            assert handle.report().tokens_seen == 94

    def test_without_cache_it_is_stock(self, model: Any, ids: torch.Tensor) -> None:
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": False}
        stock = model.generate(ids, **options)
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.3) as handle:
            assert torch.equal(model.generate(ids, **options), stock)
            assert torch.equal(
                model.generate(ids, generation_config=GenerationConfig(**options, pad_token_id=0)), stock
            )
            with pytest.raises(sdk.PatchStateError):
                handle.report()

    @pytest.mark.parametrize("given", ["argument", "generation_config", "model_default"])
    def test_naming_the_dynamic_cache_is_no_mode_of_its_own(self, model: Any, ids: torch.Tensor, given: str) -> None:
        stock = model.generate(ids, max_new_tokens=6, do_sample=False)
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "dynamic"}
        if given == "generation_config":
            options = {"generation_config": GenerationConfig(**options, pad_token_id=0)}
        if given == "model_default":
            model.generation_config.cache_implementation = options.pop("cache_implementation")
        with sdk.apply(model, policy="full") as handle:
            assert torch.equal(model.generate(ids, **options), stock)
            assert handle.report().tokens_seen == 95

    def test_a_models_default_without_cache_counts_behind_a_config_object(self, model: Any, ids: torch.Tensor) -> None:
        model.generation_config.use_cache = False
        with sdk.apply(model, policy="full") as handle:
            model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2, pad_token_id=0))
            with pytest.raises(sdk.PatchStateError):
                handle.report()

    def test_pipeline(self, model: Any, char_tokenizer: Any) -> None:
        texts = ["The key is under the mat. Where is it?", "What is 2 - 1? " * 5]
        generator = pipeline("text-generation", model=model, tokenizer=char_tokenizer)
        options = {"max_new_tokens": 12, "do_sample": False, "batch_size": 2, "return_full_text": False}
        stock = generator(texts, **options)
        with sdk.apply(model, policy="full") as handle:
            assert generator(texts, **options) == stock
            assert handle.report().tokens_seen == len(texts[1]) + 11
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75) as handle:
            found = generator(texts, **options)
            assert [len(one) for one in found] == [1, 1]
            assert handle.report().bytes.used < 0.9 * handle.report().bytes.full

    def test_embeddings_instead_of_ids(self, model: Any, ids: torch.Tensor) -> None:
        embeddings = model.get_input_embeddings()(ids).detach()
        stock = model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
        with sdk.apply(model, policy="full") as handle:
            found = model.generate(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
            assert handle.report().tokens_seen == 97
        assert torch.equal(found, stock)

    def test_an_interrupted_generation_leaves_its_report(self, model: Any, ids: torch.Tensor) -> None:
        class Impatient(Recorder):
            def put(self, value: torch.Tensor) -> None:
                super().put(value)
                if len(self.tokens) == 93:
                    raise KeyboardInterrupt

        with sdk.apply(model, policy="full") as handle:
            with pytest.raises(KeyboardInterrupt):
                model.generate(ids, max_new_tokens=20, do_sample=False, streamer=Impatient())
            assert handle.report().tokens_seen == 92

    def test_inference_mode(self, model: Any, ids: torch.Tensor) -> None:
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75):
            expected = model.generate(ids, max_new_tokens=200, do_sample=False)
            with torch.inference_mode():
                assert torch.equal(model.generate(ids, max_new_tokens=200, do_sample=False), expected)

    def test_guidance_runs_the_model_beside_its_own_cache(self, model: Any, ids: torch.Tensor) -> None:
        options = {"max_new_tokens": 8, "do_sample": False, "guidance_scale": 1.8, "negative_prompt_ids": ids[:, :20]}
        stock = model.generate(ids, **options)
        with sdk.apply(model, policy="full") as handle:
            assert torch.equal(model.generate(ids, **options), stock)
            assert handle.report().tokens_seen == 97


class TestSecondTurn:
    """A finished generation's cache goes on."""

    @pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3-mixed"])
    @pytest.mark.parametrize("chunk", [1, 2, 40], ids=lambda n: f"chunk{n}")
    def test_at_full_budget_it_equals_stock(self, variant: str, chunk: int, ids: torch.Tensor) -> None:
        model, more = new_model(variant, 2), prompts([chunk], label="more").ids

        def two_turns() -> torch.Tensor:
            options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
            first = model.generate(ids, **options)
            question = torch.cat([first.sequences, more], dim=1)
            return model.generate(question, past_key_values=first.past_key_values, **options).sequences

        stock = two_turns()
        with sdk.apply(model, policy="full") as handle:
            assert torch.equal(two_turns(), stock)
            assert handle.report().tokens_seen == 90 + 10 + chunk + 9

    def test_a_padded_batch_goes_on(self, model: Any) -> None:
        batch, more = prompts([60, 33]), prompts([7, 7], label="more").ids

        def two_turns() -> torch.Tensor:
            options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
            first = model.generate(batch.ids, attention_mask=batch.mask, **options)
            question = torch.cat([first.sequences, more], dim=1)
            mask = torch.cat([batch.mask, torch.ones(2, 17, dtype=torch.long)], dim=1)
            cache = first.past_key_values
            return model.generate(question, attention_mask=mask, past_key_values=cache, **options).sequences

        stock = two_turns()
        with sdk.apply(model, policy="full"):
            assert torch.equal(two_turns(), stock)

    def test_a_cache_made_ahead_serves_two_turns(self, model: Any, ids: torch.Tensor) -> None:
        with sdk.apply(model, policy=SMALL_TASK_KV, ratio=0.75) as handle:
            expected = model.generate(ids, max_new_tokens=6, do_sample=False)
            cache = handle.new_cache()
            first = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
            assert torch.equal(first, expected)
            kept = [layer[0][0] for layer in cache.kept_positions()]
            model.generate(first, past_key_values=cache, max_new_tokens=6, do_sample=False)
            assert cache.get_seq_length() == 101
            # Nothing of the prompt's plan changes, every new token is appended to every head.
            for before, layer in zip(kept, cache.kept_positions(), strict=True):
                assert layer[0][0] == [*before, *range(before[-1] + 1, 101)]


REFUSED = {
    "num_beams": (2, "beam search"),
    "penalty_alpha": (0.6, "contrastive search"),
    "dola_layers": ("low", "DoLa decoding"),
    "assistant_early_exit": (1, "assisted generation"),
    "prompt_lookup_num_tokens": (3, "prompt lookup decoding"),
    "prefill_chunk_size": (8, "chunked prefill"),
    "cache_implementation": ("static", "another cache implementation"),
}


class TestRefused:
    """Modes that need to copy, rewind or replace the cache."""

    @pytest.mark.parametrize("mode", REFUSED)
    @pytest.mark.parametrize("given", ["argument", "generation_config", "model_default", "model_default_behind_config"])
    def test_mode_is_refused_by_name(self, model: Any, ids: torch.Tensor, mode: str, given: str) -> None:
        value, what = REFUSED[mode]
        options: dict[str, Any] = {"max_new_tokens": 2}
        if given == "argument":
            options = {"max_new_tokens": 2, mode: value}
        elif given == "generation_config":
            options = {"generation_config": GenerationConfig(max_new_tokens=2, **{mode: value})}
        else:
            setattr(model.generation_config, mode, value)
        if given == "model_default_behind_config":  # what the object leaves open comes from the model's own
            options = {"generation_config": GenerationConfig(max_new_tokens=2)}
        with (
            sdk.apply(model),
            pytest.raises(sdk.UnsupportedGenerationError, match=re.escape(f"{what} ({mode}={value!r})")),
        ):
            model.generate(ids, **options)

    def test_assisted_generation_is_refused(self, model: Any, ids: torch.Tensor) -> None:
        refused = pytest.raises(sdk.UnsupportedGenerationError, match=r"assisted generation \(assistant_model")
        with sdk.apply(model), refused:
            model.generate(ids, assistant_model=new_model("llama", 8), max_new_tokens=2)

    @pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized", "paged"])
    def test_other_caches_are_refused(self, model: Any, ids: torch.Tensor, implementation: str) -> None:
        with sdk.apply(model), pytest.raises(sdk.UnsupportedGenerationError, match=implementation):
            model.generate(ids, cache_implementation=implementation, max_new_tokens=2)

    def test_continuous_batching_is_refused(self, model: Any) -> None:
        with sdk.apply(model), pytest.raises(sdk.UnsupportedGenerationError, match="generate_batch"):
            model.generate_batch([[1, 2, 3]])

    def test_an_argument_outranks_the_models_default(self, model: Any, ids: torch.Tensor) -> None:
        model.generation_config.num_beams = 2
        with sdk.apply(model, policy="full"):
            assert model.generate(ids, num_beams=1, do_sample=False, max_new_tokens=2).shape == (1, 92)

    def test_a_refusal_leaves_no_cache_and_the_model_usable(self, model: Any, ids: torch.Tensor) -> None:
        stock = model.generate(ids, max_new_tokens=4, do_sample=False)
        with sdk.apply(model, policy="full") as handle:
            with pytest.raises(sdk.UnsupportedGenerationError):
                model.generate(ids, num_beams=2)
            with pytest.raises(sdk.PatchStateError):
                handle.report()
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), stock)

    def test_every_refused_mode_works_again_after_the_revert(self, model: Any, ids: torch.Tensor) -> None:
        sdk.apply(model).revert()
        assert model.generate(ids, num_beams=2, max_new_tokens=2, do_sample=False).shape == (1, 92)
        assert model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2, do_sample=False).shape == (1, 92)


@pytest.mark.parametrize(
    "policy",
    [
        "streaming-llm",
        SnapKV(observation_window=4),
        PyramidKV(observation_window=4),
        SMALL_TASK_KV,
        KVzip(2, 3, whole=26),
        SMALL_REHEARSED_KV,
        SMALL_EVIDENCE_KV,
    ],
    ids=["streaming-llm", "snapkv", "pyramidkv", "task-kv", "kvzip", "rehearsed-kv", "evidence-kv"],
)
def test_a_compressed_batch_equals_its_sequences_alone(policy: Any) -> None:
    """Padding and neighbours change neither classes nor keep-sets nor tokens."""
    model = new_model("qwen2", 2)
    batch = prompts([80, 57, 31])
    with sdk.apply(model, policy=policy, ratio=0.75) as handle:
        cache = handle.new_cache()
        together = model.generate(
            batch.ids, attention_mask=batch.mask, past_key_values=cache, max_new_tokens=10, do_sample=False
        )
        kept, classes = cache.kept_positions(), [layer.by_sequence for layer in handle.report().layers]
        for sequence, length in enumerate(batch.lengths):
            cache = handle.new_cache()
            one = batch.ids[sequence : sequence + 1, -length:]
            alone = model.generate(one, past_key_values=cache, max_new_tokens=10, do_sample=False)
            assert alone[0, length:].tolist() == together[sequence, -10:].tolist()
            assert [layer[0] for layer in cache.kept_positions()] == [layer[sequence] for layer in kept]
            found = [layer.heterogeneous for layer in handle.report(cache).layers]
            assert found == [layer[sequence] for layer in classes]


def test_token_ids_fit_the_tiny_vocabulary(char_tokenizer: Any) -> None:
    assert len(char_tokenizer) <= VOCABULARY
