"""The engine that asks a vLLM server: what it sends, what it does where the server says no. The server here
is a stand-in; `make test-vllm` has the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from sessions import made, pictures
from voco_plugin.cache.engine_request import salt_of
from voco_plugin.core.attachment import attachment
from voco_plugin.inference.answering import compress_images
from voco_plugin.serving.engines.request import EngineError, EngineRequest, RequestError, Sampling, Step
from voco_plugin.serving.engines.vllm import VLLMEngine
from voco_plugin.serving.known_answer import known_answer
from voco_plugin.store.store import VoCoCacheStore


class StandIn:
    """Answers as vLLM's API server does: token ids in events, or what ``says`` says."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.says: list = []  # per request: a status, a list of events, or None for the usual
        self.left = 0
        self.usual = [5, 6, 7]

    async def models(self, request: Request) -> JSONResponse:
        if request.headers.get("authorization") == "Bearer wrong":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return JSONResponse({"data": [{"id": "engine", "max_model_len": 64}]})

    async def completions(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        says = self.says.pop(0) if self.says else None
        if isinstance(says, int):
            return JSONResponse({"error": {"message": "EngineCore says no"}}, says)

        async def events():
            try:
                for number, token in enumerate(says or self.usual):
                    if token == "wait":
                        await asyncio.sleep(30)
                        continue
                    if isinstance(token, dict):
                        yield f"data: {json.dumps(token)}\n\n"
                        continue
                    choice = {"index": 0, "text": "x", "token_ids": [token], "finish_reason": None}
                    if body.get("logprobs") is not None:
                        top = {f"token_id:{token}": -0.25, "token_id:99": -2.0}
                        choice["logprobs"] = {"token_logprobs": [-0.25], "top_logprobs": [top]}
                    if number + 1 == len(says or self.usual):
                        choice["finish_reason"] = "length"
                    yield f"data: {json.dumps({'choices': [choice]})}\n\n"
                yield "data: [DONE]\n\n"
            except asyncio.CancelledError:
                self.left += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")


@pytest.fixture()
def stand_in():
    server_side = StandIn()
    app = Starlette(
        routes=[
            Route("/v1/models", server_side.models),
            Route("/v1/completions", server_side.completions, methods=["POST"]),
        ]
    )
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    server_side.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    while not server.started:
        time.sleep(0.01)
    yield server_side
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def pair():
    return made("llava_llama")


@pytest.fixture()
def store(pair, tmp_path):
    with VoCoCacheStore.for_model(tmp_path / "store", pair[0]) as opened:
        yield opened


@pytest.fixture()
def asked(pair, store):
    """A request with one image, which is in the store."""
    (image,) = pictures(1)
    (cache,) = compress_images(*pair, [image])
    key = store.key_of(image)
    store.put(key, cache)
    voco = attachment(pair[0]).vocab.voco_id
    return EngineRequest((1, voco, voco, 9, 8), cache, (key,), Sampling(3))


@contextlib.contextmanager
def running(pair, store, stand_in, **options):
    voco = attachment(pair[0]).vocab.voco_id
    engine = VLLMEngine(stand_in.url, store, voco, wait_seconds=1, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


def answered(engine, request):
    async def ask():
        answer = engine.submit(request)
        steps = [step async for step in answer]
        await engine._client().aclose()
        return steps, answer.finish_reason

    return asyncio.run(ask())


def test_what_it_sends_and_gives(pair, store, stand_in, asked):
    sampling = Sampling(
        3, temperature=0.5, top_p=0.9, top_k=4, seed=7, presence_penalty=0.1, frequency_penalty=0.2,
        logit_bias={9: 2.0}, logprobs=1, stop_ids=(3,), ignore_eos=True,
    )  # fmt: skip
    request = EngineRequest(asked.ids, asked.blocks, asked.keys, sampling)
    with running(pair, store, stand_in, api_key="secret") as engine:
        assert engine.max_positions == 64 and engine.state()["ready"]
        engine.check(request)
        steps, reason = answered(engine, request)
    assert steps == [Step(token, -0.25, ((token, -0.25),)) for token in (5, 6, 7)] and reason == "length"
    (body,) = stand_in.bodies
    assert stand_in.headers[0]["authorization"] == "Bearer secret"
    assert body["prompt"] == list(asked.ids) and body["model"] == "engine" and body["stream"]
    assert body["cache_salt"] == salt_of(asked.keys)
    assert body["kv_transfer_params"] == {"voco": [{"key": asked.keys[0], "at": 1, "block": 0}]}
    wanted = {
        "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 7, "presence_penalty": 0.1,
        "frequency_penalty": 0.2, "logit_bias": {"9": 2.0}, "logprobs": 1, "stop_token_ids": [3],
        "ignore_eos": True, "return_tokens_as_token_ids": True, "return_token_ids": True,
    }  # fmt: skip
    assert {name: body[name] for name in wanted} == wanted


def test_text_alone_has_no_salt(pair, store, stand_in):
    from voco_plugin.cache import VoCoCache

    with running(pair, store, stand_in) as engine:
        assert answered(engine, EngineRequest((1, 2), VoCoCache(), (), Sampling(3)))[1] == "length"
    assert "cache_salt" not in stand_in.bodies[0] and "kv_transfer_params" not in stand_in.bodies[0]


def test_a_block_that_the_store_has_dropped_is_put_back_first(pair, store, stand_in, asked):
    with running(pair, store, stand_in) as engine:
        store.delete(asked.keys)
        answered(engine, asked)
        assert asked.keys[0] in store
        # dropped between the look and vLLM's read: once more, and then it is said
        stand_in.says = [500, None]
        assert answered(engine, asked)[1] == "length" and len(stand_in.bodies) == 3
        stand_in.says = [500, 500]
        with pytest.raises(EngineError, match="EngineCore says no"):
            answered(engine, asked)
        assert len(stand_in.bodies) == 5 and engine.state()["failed"] == 1


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ([5, {"error": {"message": "died"}}], "died"),
        ([5, {"choices": [{"token_ids": [], "finish_reason": "error"}]}], "ended this request with 'error'"),
        ([5, {"choices": [{"token_ids": [], "finish_reason": "abort"}]}], "'abort'"),
        ([{"choices": []}], "without a reason"),
    ],
)
def test_a_failure_after_a_token_is_not_asked_again(pair, store, stand_in, asked, says, said):
    stand_in.says = [says, says]
    with running(pair, store, stand_in) as engine, pytest.raises(EngineError, match=said):
        answered(engine, asked)
    assert len(stand_in.bodies) == (1 if says[0] == 5 else 2)


def test_leaving_closes_the_connection(pair, store, stand_in, asked):
    stand_in.says = [[5, "wait", 6]]

    async def leave(engine):
        answer = engine.submit(asked)
        async for _ in answer:
            answer.cancel()
            break
        await asyncio.sleep(0.3)
        assert answer.finish_reason is None and engine.state()["running"] == 0

    with running(pair, store, stand_in) as engine:
        asyncio.run(leave(engine))
    until = time.monotonic() + 5
    while not stand_in.left and time.monotonic() < until:
        time.sleep(0.02)
    assert stand_in.left == 1


def test_a_server_that_is_not_there_or_another_models(pair, store, stand_in, asked):
    voco = attachment(pair[0]).vocab.voco_id
    with pytest.raises(EngineError, match="there is no vLLM server at http://127.0.0.1:1/v1"):
        VLLMEngine("http://127.0.0.1:1", store, voco, wait_seconds=0).start()
    with pytest.raises(EngineError, match="wants a key"):
        VLLMEngine(stand_in.url, store, voco, api_key="wrong", wait_seconds=0).start()
    with pytest.raises(EngineError, match="answers a known question otherwise"):
        VLLMEngine(
            stand_in.url, store, voco, wait_seconds=0, known=lambda: known_answer(*pair, store)
        ).start()
    request, steps, _ = known_answer(*pair, store)
    assert len(steps) == 3 and request.keys[0] in store


def test_a_request_that_cannot_be_answered_is_not_sent(pair, store, stand_in, asked):
    with running(pair, store, stand_in) as engine:
        cases = ((5,) * 80, "64 positions"), (asked.ids[:3], "ends with an image"), ((1, 9), "0 VoCo")
        for ids, said in cases:
            with pytest.raises(RequestError, match=said):
                engine.check(EngineRequest(ids, asked.blocks, asked.keys, asked.sampling))
    assert not stand_in.bodies
    with pytest.raises(EngineError, match="stopping"):
        answered(engine, asked)
