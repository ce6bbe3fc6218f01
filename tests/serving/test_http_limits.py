"""Nothing that a client does keeps others from their answers: limits, keys, slow and vanished clients."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import struct
import threading
import time
import zlib

import httpx
import pytest
from http_fakes import NAME, Server, data_url, events, picture, shown, waited

from voco_plugin.serving.http.client_gone import EventStream
from voco_plugin.serving.http.errors import ApiError
from voco_plugin.serving.http.limits import ClientGoneError
from voco_plugin.serving.http.logs import write_logs
from voco_plugin.serving.http.request_record import RequestRecord

TALK = {"model": NAME, "messages": [{"role": "user", "content": "What?"}]}


def code(answer) -> tuple:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"], error
    return answer.status_code, error["code"]


def metric(server, name: str) -> float:
    lines = server.front.metrics.text().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


# -- keys


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"}, {"Authorization": "Basic one"}, {"Authorization": "one"},
        {"Authorization": "Bearer one two"}, {"Authorization": "Bearer oneone"}, {"X-Api-Key": "one"},
        {"Authorization": "Bearer on\u00e9".encode()},
    ],
)  # fmt: skip
def test_without_a_key_there_is_nothing_but_the_health(headers):
    server = Server(api_keys=("one", "zw\u00f6i"))

    async def asked() -> list:
        async with server.client() as client:
            paths = ("/metrics", "/v1/models", "/openapi.json", "/nope")
            found = [await client.get(path, headers=headers) for path in paths]
            found.append(await client.post("/v1/chat/completions", json=TALK, headers=headers))
            assert (await client.get("/health", headers=headers)).status_code == 200
            return found

    for answer in asyncio.run(asked()):
        assert code(answer) == (401, "invalid_api_key") and answer.headers["www-authenticate"] == "Bearer"
    assert server.engine.requests == [] and metric(server, 'voco_rejected_total{reason="key"}') == 5


def test_any_of_the_keys_lets_in():
    server = Server(api_keys=("one", "two"))
    for header in ("Bearer one", "bearer two", "BEARER  one"):
        assert server.post("/v1/chat/completions", TALK, Authorization=header).status_code == 200
    assert server.get("/metrics", Authorization="Bearer two").status_code == 200


# -- bodies


def test_a_body_that_is_too_large_is_not_read():
    server = Server(max_body=1000)
    long = {**TALK, "user": "x" * 2000}
    assert code(server.post("/v1/chat/completions", long)) == (413, "body_too_large")

    async def in_pieces():
        sent = 0

        async def pieces():
            nonlocal sent
            for _ in range(1000):
                sent += 100
                yield b" " * 100

        async with server.client(**{"Content-Type": "application/json"}) as client:
            return await client.post("/v1/chat/completions", content=pieces()), sent

    answer, _ = asyncio.run(in_pieces())
    assert code(answer) == (413, "body_too_large") and answer.headers["connection"] == "close"
    assert server.front.queue.taken == 0
    assert server.post("/v1/chat/completions", TALK).status_code == 200


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_what_a_web_page_may_send_unasked_is_not_read(kind):
    server = Server()

    async def sent():
        async with server.client(**({} if kind is None else {"Content-Type": kind})) as client:
            return await client.post("/v1/chat/completions", content=json.dumps(TALK))

    assert code(asyncio.run(sent())) == (415, "unsupported_media_type")


def test_a_host_name_that_is_not_this_server():
    server = Server(host_names=("localhost", "[::1]"))
    for host in ("localhost", "LOCALHOST:8000", "[::1]:80", "[::1]"):
        assert server.get("/health", Host=host).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1", "[::2]", ""):
        assert code(server.get("/health", Host=host)) == (421, "unknown_host"), host


@pytest.mark.parametrize("images", [3, 30])
def test_too_many_images(images):
    server = Server(max_images=2)
    assert code(server.chat(shown(*range(images)))) == (400, "too_many_images")
    assert server.blocks.misses == 0


def test_a_text_that_is_too_long_is_not_tokenized():
    server = Server(max_text=100)
    assert code(server.chat("a" * 101)) == (400, "context_length_exceeded")
    answer = server.post("/v1/completions", {"model": NAME, "prompt": "a" * 101})
    assert code(answer) == (400, "context_length_exceeded")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims as many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(200, 200), (2**31 - 1, 2**31 - 1), (60_000, 60_000), (1, 40_000)])
def test_image_bombs_are_not_decoded(size, monkeypatch):
    server = Server(max_pixels=30_000)
    monkeypatch.setattr("voco_plugin.serving.http.media.open_image", lambda data: pytest.fail("decoded"))
    parts = [{"type": "image_url", "image_url": {"url": data_url(bomb(*size))}}]
    answer = server.chat([{"role": "user", "content": parts}])
    assert answer.status_code == 400 and code(answer)[1] in ("image_too_large", "invalid_image")


def test_an_image_file_that_is_too_large_is_not_decoded_from_base64(monkeypatch):
    server = Server(max_image=1000)
    monkeypatch.setattr("base64.b64decode", lambda *a, **k: pytest.fail("decoded"))
    parts = [{"type": "image_url", "image_url": {"url": data_url(b"x" * 2000)}}]
    assert code(server.chat([{"role": "user", "content": parts}])) == (400, "image_too_large")
    parts = [{"type": "image_url", "image_url": {"url": "data:image/png," + "%20" * 2000}}]
    assert code(server.chat([{"role": "user", "content": parts}])) == (400, "image_too_large")


# -- the queue, and time


def test_the_queue_is_bounded_and_gives_its_places_back():
    server = Server(max_running=2, max_waiting=2, retry_after=7)
    server.engine.script = lambda request: [0.2, "late"]

    async def many() -> list:
        async with server.client() as client:
            bodies = [{**TALK, "n": n, "stream": stream} for n, stream in ((1, False), (2, True), (1, False))]
            first = [asyncio.ensure_future(client.post("/v1/chat/completions", json=b)) for b in bodies]
            await asyncio.sleep(0.1)
            assert server.front.queue.taken == 4
            more = await asyncio.gather(*(client.post("/v1/chat/completions", json=TALK) for _ in range(20)))
            return [*await asyncio.gather(*first), *more]

    first, second, third, *more = asyncio.run(many())
    assert {answer.status_code for answer in (first, second, third)} == {200}
    for answer in more:
        assert code(answer) == (429, "queue_full") and answer.headers["retry-after"] == "7"
    assert server.front.queue.taken == 0 and metric(server, "voco_rejected_total") == 20
    answer = server.post("/v1/chat/completions", {**TALK, "n": 5})
    assert answer.status_code == 400 and "gives 4" in answer.json()["error"]["message"]


def test_what_has_no_place_is_not_compressed():
    server = Server(max_running=1, max_waiting=2)
    server.front.queue.taken = 1
    assert code(server.chat(shown(10), n=3)) == (429, "queue_full") and server.blocks.misses == 0
    assert server.front.queue.taken == 1 and server.chat(shown(10), n=2).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("where", ["engine", "stage 1"])
def test_a_request_ends_when_its_time_is_up(stream, where):
    server = Server(request_seconds=0.15)
    if where == "engine":
        server.engine.script = lambda request: ["red", 30.0]
    else:
        server.blocks.delay = 30.0
    start = time.monotonic()
    answer = server.chat(shown(10), stream=stream)
    assert time.monotonic() - start < 3
    if stream and where == "engine":
        assert events(answer)[-1]["error"]["code"] == "timeout"
    else:
        assert code(answer) == (504, "timeout")
    assert all(one.left for one in server.engine.answers) and server.front.queue.taken == 0
    assert metric(server, "voco_requests_total") == 1
    assert 'outcome="timeout"' in server.front.metrics.text().decode()


def test_a_thousand_bad_requests_leave_nothing():
    server = Server()
    bad = [
        b"{", b"{}", b"null", b'{"model": "x"}', b"\xff", json.dumps({**TALK, "n": -1}).encode(),
        json.dumps({**TALK, "messages": shown(1) * 30}).encode(),
        json.dumps({**TALK, "messages": [{"role": "user", "content": "<image>"}]}).encode(),
    ]  # fmt: skip

    async def many() -> set:
        async with server.client(**{"Content-Type": "application/json"}) as client:
            found = [await client.post("/v1/chat/completions", content=bad[i % 8]) for i in range(1000)]
            assert (await client.post("/v1/chat/completions", json=TALK)).status_code == 200
            return {answer.status_code for answer in found}

    assert asyncio.run(many()) <= {400, 404}
    assert server.front.queue.taken == 0 and len(server.engine.requests) == 1


def test_places_are_counted_as_they_are_taken():
    queue = Server(max_running=1, max_waiting=2).front.queue
    record = RequestRecord()
    queue.enter(record), queue.enter(record, 2)
    with pytest.raises(ApiError, match="3 of 3 places"):
        queue.enter(RequestRecord())
    queue.leave(record), queue.leave(record)
    assert queue.taken == 0


# -- real connections


@pytest.fixture(scope="module")
def real():
    server = Server(body_seconds=0.3, max_body=100_000)
    with server.running() as url:
        yield server, url


def raw(url: str, *parts: bytes | float) -> bytes:
    """Send ``parts`` as they are, with pauses; all that comes back."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        try:
            for part in parts:
                time.sleep(part) if isinstance(part, float) else connection.sendall(part)
        except OSError:
            pass
        found = b""
        while piece := connection.recv(65536):
            found += piece
            if found.endswith(b"}}") or b"[DONE]" in found:
                break
        return found


def head(length: str = "Content-Length: 100") -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    ).encode()


def test_a_slow_body_is_given_up(real):
    server, url = real
    start = time.monotonic()
    found = raw(url, head(), b"{", 0.1, b" ", 0.1, b" ", 0.1, b" ")
    assert found.startswith(b"HTTP/1.1 408") and b"slow_body" in found and time.monotonic() - start < 3
    assert waited(lambda: server.front.queue.taken == 0)


def test_a_body_without_a_length_is_cut_off(real):
    server, url = real
    piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    found = raw(url, head("Transfer-Encoding: chunked"), *[piece] * 10)
    assert found.startswith(b"HTTP/1.1 413") and b"body_too_large" in found
    found = raw(url, head("Content-Length: 99999999999999999999999"))
    assert found.split()[1] in (b"413", b"400")
    assert waited(lambda: server.front.queue.taken == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_who_leaves_ends_their_answer(real, stream, n):
    server, url = real
    server.engine.script = lambda request: ["red", 20.0, "late"]
    before = len(server.engine.answers)
    body = json.dumps({**TALK, "stream": stream, "n": n}).encode()
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 5)
    connection.sendall(head(f"Content-Length: {len(body)}") + body)
    if stream:
        assert connection.recv(300).startswith(b"HTTP/1.1 200")
    assert waited(lambda: len(server.engine.answers) == before + n)
    time.sleep(0.05)
    assert not any(one.left for one in server.engine.answers[before:])
    gone = metric(server, 'voco_requests_total{outcome="client_gone"')
    connection.close()
    assert waited(lambda: all(one.left for one in server.engine.answers[before:]))
    assert waited(lambda: server.front.queue.taken == 0)
    assert waited(lambda: metric(server, 'voco_requests_total{outcome="client_gone"') == gone + 1)
    server.engine.script = lambda request: ["fine"]
    assert httpx.post(f"{url}/v1/chat/completions", json=TALK).status_code == 200


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_answer_ends_wherever_sending_fails(at):
    """Some servers say that a client has left by failing to send."""
    ended, sent = [], []

    async def events():
        yield {"a": 1}
        yield {"a": 2}

    async def send(message) -> None:
        if len(sent) == at:
            raise OSError("closed")
        sent.append(message)

    async def receive():
        await asyncio.sleep(60)

    async def whole() -> None:
        stream = EventStream(events(), time.perf_counter() + 5, lambda: ended.append(1))
        await stream({"type": "http"}, receive, send)

    with pytest.raises(ClientGoneError):
        asyncio.run(whole())
    assert ended == [1] and len(sent) == at


def test_who_leaves_before_stage_one_is_done_asks_for_nothing(real):
    server, url = real
    server.blocks.delay = 0.3
    before = len(server.engine.answers)
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{url}/v1/chat/completions", json={**TALK, "messages": shown(10)}, timeout=0.1)
    assert waited(lambda: server.front.queue.taken == 0)
    time.sleep(0.3)
    assert len(server.engine.answers) == before
    server.blocks.delay = 0.0


def test_a_reader_that_does_not_read_is_given_up():
    server = Server(request_seconds=0.5)
    server.engine.script = lambda request: ["the " * 100] * 200
    server.engine.max_positions = 10**6
    with server.running() as url:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({**TALK, "stream": True, "max_tokens": 4096}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            connection.connect((host, int(port)))
            connection.sendall(head(f"Content-Length: {len(body)}") + body)
            assert waited(lambda: server.front.queue.taken == 1)
            assert waited(lambda: server.front.queue.taken == 0, 8)
        assert httpx.get(f"{url}/health").status_code == 200


def test_stopping_lets_answers_end_and_takes_no_more():
    server = Server(drain_seconds=5.0)
    server.engine.script = lambda request: ["red", 0.5, " square"]
    found: list = []
    with server.running() as url:
        assert server.engine.started and server.blocks.started
        asking = threading.Thread(
            target=lambda: found.append(httpx.post(f"{url}/v1/chat/completions", json=TALK, timeout=10))
        )
        asking.start()
        assert waited(lambda: len(server.engine.requests) == 1)
        with httpx.Client() as client:
            assert client.get(f"{url}/health").status_code == 200
            server.front.queue.draining = True
            answer = client.post(f"{url}/v1/chat/completions", json=TALK)
            assert code(answer) == (503, "stopping") and "retry-after" in answer.headers
            health = client.get(f"{url}/health")
            assert health.status_code == 503 and health.json()["status"] == "stopping"
    asking.join(10)
    assert found[0].json()["choices"][0]["message"]["content"] == "red square"
    assert server.engine.stopped and server.blocks.stopped


def test_a_signal_begins_the_draining():
    from voco_plugin.serving.http.server import server_of

    server = Server()
    server_of(server.app).handle_exit(15, None)
    assert server.front.queue.draining


# -- what is said of it


def test_the_log_has_a_line_a_request_and_nothing_of_what_was_sent():
    server = Server(api_keys=("topsecret",))
    said = io.StringIO()
    handler = write_logs(said)
    try:
        url = data_url(picture(123))
        talk = {**TALK, "messages": shown(123, text="my private question"), "user": "me@example.org"}
        key = {"Authorization": "Bearer topsecret"}
        answer = server.post("/v1/chat/completions", talk, **key)
        kept = server.post("/v1/voco/compress", {"image": url}, **key).json()["key"]
        server.post("/v1/chat/completions", talk, Authorization="Bearer wrongkey")
        server.post("/v1/chat/completions", {**talk, "stream": True, "stop": ""}, **key)
        server.engine.script = lambda request: [ValueError("my private failure")]
        assert server.post("/v1/chat/completions", talk, **key).status_code == 500
    finally:
        for name in ("voco_plugin", "uvicorn"):
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).propagate = True
    lines = [json.loads(line) for line in said.getvalue().splitlines()]
    asked = [line for line in lines if "request" in line]
    assert [line["status"] for line in asked] == [200, 200, 401, 400, 500]
    first = asked[0]
    assert first["request"] == answer.headers["x-request-id"] and first["route"] == "/v1/chat/completions"
    assert first["prompt_tokens"] == len(server.engine.requests[0].ids) and first["voco_tokens"] == 2
    assert first["completion_tokens"] == 3 and first["images"] == 1 and first["finish"] == ["stop"]
    assert 0 < first["first_token_seconds"] <= first["seconds"] and asked[1]["hits"] == 1
    for secret in ("private question", "topsecret", "wrongkey", kept, url[30:60], "me@example", "red square"):
        assert secret not in said.getvalue()


def test_metrics_count_what_happened():
    server = Server()
    server.chat(shown(10, 20)), server.chat(shown(10)), server.chat(stop="")
    whole = server.get("/metrics")
    assert whole.headers["content-type"].startswith("text/plain")
    block = server.engine.requests[0].blocks.blocks[0]
    for name, value in {
        'voco_requests_total{outcome="ok",route="/v1/chat/completions"}': 2,
        'voco_requests_total{outcome="client_error",route="/v1/chat/completions"}': 1,
        "voco_cache_hits_total": 1, "voco_cache_misses_total": 2, "voco_stage1_seconds_count": 2,
        "voco_stage2_seconds_count": 2, "voco_first_token_seconds_count": 2, "voco_engine_ready": 1,
        'voco_tokens_total{kind="prompt_voco"}': 6, 'voco_tokens_total{kind="saved_vision"}': 21,
        "voco_saved_bytes_total": 3 * block.nbytes / 2 * 7,
    }.items():  # fmt: skip
        assert metric(server, name) == value, name
    other = Server()
    assert metric(other, "voco_requests_total") == 0


def test_a_state_that_cannot_be_had_is_not_healthy():
    server = Server()

    def broken() -> dict:
        raise OSError("no store")

    server.blocks.state = broken
    answer = server.get("/health")
    assert answer.status_code == 503 and "no store" in answer.json()["blocks"]["error"]
    assert server.get("/metrics").status_code == 200
