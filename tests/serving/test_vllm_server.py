"""vLLM's own OpenAI server answers from blocks over HTTP, in an engine process of its own.

Needs vLLM's own environment: ``make test-vllm``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_reference import NEW
from vllm_runs import GIVEN, bridge, case, cases, needs_vllm
from vllm_worker import transfer_config

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(GIVEN / "engine"),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--block-size", "32", "--max-num-seqs", "16", "--max-num-batched-tokens", "64",
        "--kv-transfer-config", json.dumps(transfer_config(str(GIVEN / "store"))),
    ]  # fmt: skip
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, log)
            yield address, log
        finally:
            process.terminate()
            process.wait(60)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + 500
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-6000:])


@pytest.fixture(scope="module")
def client(server: tuple[str, Path]) -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=120)


def body(one: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What `client.completions.create` takes for a compared prompt."""
    fields = bridge.request_fields([bridge.PlacedBlock(**b) for b in one["blocks"]]) if one["blocks"] else {}
    return {
        "model": "tiny", "prompt": one["ids"], "max_tokens": NEW, "temperature": 0.0,
        "extra_body": {"return_token_ids": True, **fields}, **more,
    }  # fmt: skip


def test_sixteen_clients_at_once_get_stage_twos_tokens(client: Any) -> None:
    def ask(one: dict[str, Any]) -> list[int]:
        return client.completions.create(**body(one)).choices[0].token_ids

    with ThreadPoolExecutor(16) as pool:
        for _ in range(2):  # the second time out of the prefix cache
            answers = list(pool.map(ask, cases()))
            bad = [c["name"] for c, tokens in zip(cases(), answers, strict=True) if tokens != c["tokens"]]
            assert bad == []
    sys.stdout.write(f"{2 * len(cases())} of {2 * len(cases())} over HTTP, 16 at once\n")


def test_a_stream_and_several_answers(client: Any) -> None:
    one = case("K8-several-1")
    whole = client.completions.create(**body(one))
    pieces = [part.choices[0].text for part in client.completions.create(**body(one, stream=True))]
    assert "".join(pieces) == whole.choices[0].text and len(pieces) > 10
    drawn = body(one, n=3, temperature=1.0)
    drawn["extra_body"]["top_k"] = 1
    several = client.completions.create(**drawn)
    assert [choice.token_ids for choice in several.choices] == [one["tokens"]] * 3


def test_a_bad_request_is_an_error_and_the_next_is_answered(client: Any, server: tuple[str, Path]) -> None:
    openai = pytest.importorskip("openai")
    one = case("K5-middle-1")
    gone = {**one, "blocks": [{**one["blocks"][0], "key": "f" * 64}]}
    unsalted, typed = body(one), body({**one, "blocks": []})
    del unsalted["extra_body"]["cache_salt"]
    for bad, reason in (
        (body(gone), "is not in store"),
        (unsalted, "cache_salt=None does not cover"),
        (typed, "names no block"),
        (body(one, echo=True, logprobs=1), "prompt_logprobs (echo with logprobs) is refused"),
    ):
        with pytest.raises(openai.APIStatusError):
            client.completions.create(**bad)
        assert client.completions.create(**body(one)).choices[0].token_ids == one["tokens"]
        assert reason in server[1].read_text()


def test_a_typed_voco_token_in_a_chat_is_refused(client: Any) -> None:
    openai = pytest.importorskip("openai")
    chat = {"model": "tiny", "max_tokens": 4, "temperature": 0.0}
    said = client.chat.completions.create(messages=[{"role": "user", "content": "what is red"}], **chat)
    assert said.choices[0].finish_reason == "length"
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(messages=[{"role": "user", "content": "what is <voco>"}], **chat)


def test_a_client_that_leaves_takes_nothing_with_it(client: Any) -> None:
    one = case("K130-several-0")
    for _ in range(5):
        stream = client.completions.create(**body(one, stream=True, max_tokens=400))
        next(iter(stream))
        stream.close()
    assert client.completions.create(**body(one)).choices[0].token_ids == one["tokens"]
