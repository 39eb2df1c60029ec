"""Models of the hub: what is said when it does not give one, and that it is asked once."""

from __future__ import annotations

import json
import os
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

import pytest

from tests.sdk.models.tiny_checkpoints import (
    pickled,
)
from thinkkv import sdk
from thinkkv.sdk.model_sources import resolve


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
