"""`voco serve --engine vllm` with the real vLLM beside it, whose Python `make test-vllm` names."""

from __future__ import annotations

import base64
import io
import json
import os
import runpy
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

import voco_plugin as vp
from paths import ROOT
from voco_plugin.gridworld.shipped_demos import write_demo
from voco_plugin.serving.assemble import ServerParts, assemble
from voco_plugin.serving.export import export_text_model
from voco_plugin.serving.http.server import server_of
from voco_plugin.serving.http.settings import ServerSettings

PYTHON = os.environ.get("VOCO_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="make test-vllm sets VOCO_VLLM_PYTHON")
QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo("gridworld", tmp_path_factory.mktemp("demo") / "gridworld")


@pytest.fixture(scope="module")
def pair(demo):
    model, processor = vp.load(demo.model)
    return model.eval(), processor


@pytest.fixture(scope="module")
def vllm(demo, pair, tmp_path_factory):
    """vLLM's API server on the demo's export and an empty store: its URL and the store's folder."""
    folder = tmp_path_factory.mktemp("vllm")
    export_text_model(demo.model, folder / "engine")
    vp.VoCoCacheStore.for_model(folder / "store", pair[0]).close()
    port = free_port()
    connector = {
        "kv_connector": "VoCoConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "voco_plugin.integrations.vllm.connector",
        "kv_connector_extra_config": {"store": str(folder / "store")},
    }  # fmt: skip
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "engine"),
        "--served-model-name", "engine", "--enforce-eager", "--port", str(port), "--max-model-len", "512",
        "--dtype", "float32", "--kv-transfer-config", json.dumps(connector),
    ]  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **QUIET})
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until and process.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        else:
            raise AssertionError(Path(folder, "log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}", folder / "store"
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def front(pair, vllm):
    url, store = vllm
    parts = ServerParts(store=str(store), vllm_url=url)
    with assemble(*pair, "gridworld", ServerSettings(api_keys=("secret",), drain_seconds=2), parts) as app:
        server = server_of(app, port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        until = time.monotonic() + 120
        while not server.started and time.monotonic() < until:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", app.state.front
        server.should_exit = True
        thread.join(30)


def turn(image: dict, question: str) -> list:
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def url_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_the_example_runs_against_vllm(demo, front, capsys):
    file, question, known = demo.examples[2]
    example = runpy.run_path(str(ROOT / "examples" / "serve_openai_client.py"))
    arguments = [str(file), "--question", question, "--base-url", front[0], "--api-key", "secret"]
    assert example["main"](arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{question} {known}" == lines[3], lines
    assert lines[-1].startswith("NotFoundError: nothing is kept under the key 000")


def test_many_at_once_get_the_answers_of_stage_two(demo, pair, front):
    """Each image is another, some questions are of text alone, and blocks are dropped under way."""
    opened = [Image.open(file).convert("RGB") for file, _, _ in demo.examples]
    images = [image.rotate(90 * n) for image in opened for n in range(3)]
    questions = ["What is at b2?", "What is at a1?", "How many green shapes are there?"]
    caches = list(vp.compress_images(*pair, images))
    cases = [(i, q) for i in range(len(images)) for q in questions]
    wanted = vp.answer(*pair, [q for _, q in cases], caches=[caches[i] for i, _ in cases], max_new_tokens=12)
    client = openai.OpenAI(base_url=front[0], api_key="secret", max_retries=0)
    urls = [url_of(image) for image in images]

    def ask(number: int) -> str:
        index, question = cases[number % len(cases)]
        if number % 50 == 49:
            front[1].blocks.store.prune(0)
        shown = {"type": "image_url", "image_url": {"url": urls[index]}}
        said = client.chat.completions.create(
            model="gridworld", messages=turn(shown, question), max_tokens=12, stream=False
        )
        return (said.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(ask, range(3 * len(cases))))
    assert found == [text.strip() for text in wanted] * 3
    assert len(set(found)) > 5
    state = httpx.get(front[0].removesuffix("v1") + "health").json()["engine"]
    assert state["ready"] and not state["failed"]
