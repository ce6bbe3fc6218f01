"""`voco serve` as it is typed, the shipped example against it, and how it ends."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml

import voco_plugin as vp
from commands import error_of
from paths import ROOT
from voco_plugin.cli import build_parser
from voco_plugin.gridworld.shipped_demos import write_demo
from voco_plugin.serving.assemble import ServerParts, assemble
from voco_plugin.serving.http.server import server_of
from voco_plugin.serving.http.settings import ServerSettings


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo("gridworld", tmp_path_factory.mktemp("demo") / "gridworld")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "give --api-key KEY"),
        (["--host", "192.0.2.1"], "give --api-key KEY"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", " a"], "--api-key is empty, or holds what no header carries"),
        (["--port", "99999"], "--port 99999"),
        (["--engine", "vllm"], "go together"),
        (["--vllm-url", "http://127.0.0.1:1"], "go together"),
        (["--engine", "vllm", "--vllm-url", "http://127.0.0.1:1"], "give --store DIR"),
        (["--readonly"], "--readonly is of a store"),
        (["--store-max-bytes", "1GB"], "--store-max-bytes is of a store"),
        (["--store", "s", "--readonly", "--store-max-bytes", "1GB"], "leave it out with --readonly"),
        (["--vllm-api-key", "k"], "--vllm-api-key is of --engine vllm"),
        (["--kv-memory", "lots"], "is no size"),
        (["--host", "no.such.host.invalid", "--api-key", "k"], "no server at"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_loads(capsys, monkeypatch, options, said):
    monkeypatch.delenv("VOCO_API_KEY", raising=False)
    assert said in error_of(capsys, "serve", "nowhere", *options)


def test_a_taken_port_is_said(capsys, demo):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"no server at 127.0.0.1:{port}" in error_of(
            capsys, "serve", str(demo.model), "--port", str(port)
        )


def test_the_example_runs_against_the_embedded_engine(demo, tmp_path, capsys):
    model, processor = vp.load(demo.model)
    file, question, known = demo.examples[2]
    settings = ServerSettings(api_keys=("secret",), drain_seconds=1)
    parts = ServerParts(store=str(tmp_path / "store"), kv_bytes=1 << 26)
    with assemble(model.eval(), processor, "gridworld", settings, parts) as app:
        server = server_of(app, port=0)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            until = time.monotonic() + 60
            while not server.started and thread.is_alive() and time.monotonic() < until:
                time.sleep(0.05)
            assert server.started, "the server ended, or did not start within a minute"
            port = server.servers[0].sockets[0].getsockname()[1]
            example = runpy.run_path(str(ROOT / "examples" / "serve_openai_client.py"))
            arguments = [
                str(file), "--question", question, "--question", "What is at b2?",
                "--base-url", f"http://127.0.0.1:{port}/v1", "--api-key", "secret",
            ]  # fmt: skip
            assert example["main"](arguments) == 0
        finally:
            server.should_exit = True
            thread.join(30)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{question} {known}" == lines[3], lines
    assert "13 tokens of text and 4 of the image, whose 16 vision tokens" in lines[1]
    assert "16,384 bytes, kept before: True" in lines[2]
    assert [line.startswith("  drawn: ") for line in lines[5:7]] == [True, True]
    assert lines[7].startswith("NotFoundError: nothing is kept under the key 000")
    assert len(list((tmp_path / "store").iterdir())) > 0


def test_the_container_and_the_cluster_call_it_as_it_is():
    """Their files are not run here; the options that they give are the command's own."""
    folder = ROOT / "integrations" / "docker"
    entry = json.loads((folder / "Dockerfile").read_text().split("ENTRYPOINT ")[1])[2]
    words = entry.removeprefix("exec voco ").replace('"$@"', "").replace('"', "").split()
    words = [{"$VOCO_HOST": "0.0.0.0", "$VOCO_PORT": "8000"}.get(word, word) for word in words]
    documents = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    assert [one["kind"] for one in documents] == [
        "PersistentVolumeClaim", "Deployment", "Deployment", "Service",
    ]  # fmt: skip
    for deployment in documents[1:3]:
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        args, unknown = build_parser().parse_known_args([*words, *map(str, container["args"])])
        assert not unknown and args.store == "/store" and args.model == "/model"
        assert args.readonly == (deployment["metadata"]["name"] == "voco-reader")
        assert (
            deployment["spec"]["selector"]["matchLabels"]
            == (deployment["spec"]["template"]["metadata"]["labels"])
        )


class Serving:
    """The command in a process of its own."""

    def __init__(self, demo, tmp_path: Path, *options: str) -> None:
        self.log = (tmp_path / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "voco_plugin", "serve", str(demo.model), "--port", "0", *options],
            stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.url = self.process.stdout.readline().strip()
        until = time.monotonic() + 90
        while time.monotonic() < until and self.process.poll() is None:
            try:
                httpx.get(self.url.removesuffix("v1") + "health").raise_for_status()
                return
            except httpx.HTTPError:
                time.sleep(0.2)

    def said(self) -> str:
        return Path(self.log.name).read_text()

    def ask(self, max_tokens: int, **more):
        messages = [{"role": "user", "content": "What is at a1? " * 5}]
        return {"model": "voco", "messages": messages, "max_tokens": max_tokens, **more}


@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_lets_what_runs_end(demo, tmp_path, how):
    serving = Serving(demo, tmp_path, "--drain-seconds", "20", "--store", str(tmp_path / "store"))
    try:
        with httpx.Client(base_url=serving.url, timeout=60) as client:
            body = serving.ask(40, stream=True, logit_bias={"2": -100, "3": -100, "1": -100})
            with client.stream("POST", "/chat/completions", json=body) as events:
                lines = events.iter_lines()
                next(lines)
                serving.process.send_signal(how)
                rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
                assert rest[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert serving.process.wait(30) == 0
        said = serving.said()
        assert "no key: only this machine can reach it" in said and "Traceback" not in said
        assert "What is at a1?" not in said
    finally:
        serving.process.kill()
