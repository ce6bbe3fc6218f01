"""What people and machines do to a server, one after the other, and whether it is up and right after each.

    python benchmarks/serving_faults.py --out serving_faults.json

The model is the gridworld one that ships, the server the real one (uvicorn, embedded engine, a store), in
this process, so that its engine can be killed and its disk filled. After each fault the server is asked
questions whose answers are known. A line of the table: the fault, how often, how each was answered, how many
of the questions after it were right.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import io
import json
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

import voco_plugin as vp
from voco_plugin.benchmark.result_file import environment
from voco_plugin.files import atomic_write_text
from voco_plugin.gridworld.shipped_demos import write_demo
from voco_plugin.serving.assemble import ServerParts, assemble
from voco_plugin.serving.http.server import server_of
from voco_plugin.serving.http.settings import ServerSettings

KEY = "a-key"
GONE = "(gone)"


class Target:
    """The server, and what is known of it."""

    def __init__(self, app: Any, url: str, cases: list[tuple[str, str, str]]) -> None:
        self.app, self.url, self.cases = app, url, cases
        self.front = app.state.front
        headers = {"Authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=url, headers=headers, timeout=60)

    def body(self, case: int = 0, **more: Any) -> dict[str, Any]:
        url, question, _ = self.cases[case % len(self.cases)]
        image = {"type": "image_url", "image_url": {"url": url}}
        content = [image, {"type": "text", "text": question}]
        return {"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": content}], **more}

    def right(self) -> int:
        """How many of all known questions are answered rightly now; a failure is no right answer."""
        found = 0
        for number, (_, _, answer) in enumerate(self.cases):
            with contextlib.suppress(httpx.HTTPError):
                said = self.client.post("/v1/chat/completions", json=self.body(number))
                if said.status_code == 200:
                    text = said.json()["choices"][0]["message"]["content"]
                    found += text.strip() == answer
        return found

    def post(self, path: str = "/v1/chat/completions", **options: Any) -> str:
        """The status of a request, with what kind of error it names."""
        try:
            said = self.client.post(path, **options)
        except httpx.HTTPError as problem:
            return type(problem).__name__
        kind = ""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            kind = f" {said.json()['error'].get('code') or said.json()['error']['type']}"
        return f"{said.status_code}{kind}"


def png(width: int, height: int) -> str:
    """A PNG of so many pixels in a few bytes, as a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width // 8 + 1) * min(height, 50_000)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


# -- faults; each gives one outcome a try


def client_gone(target: Target) -> Iterator[str]:
    for number in range(50):
        body = target.body(number, stream=True, max_tokens=400, logit_bias={"2": -100, "3": -100})
        with target.client.stream("POST", "/v1/chat/completions", json=body) as events:
            if number % 2:
                next(events.iter_lines())
        yield GONE
    until = time.monotonic() + 20
    while time.monotonic() < until and sum(target.front.engine.state()[n] for n in ("running", "waiting")):
        time.sleep(0.05)
    left = target.front.engine.state()
    yield f"left running: {left['running'] + left['waiting']}"


def engine_killed(target: Target) -> Iterator[str]:
    engine = target.front.engine
    for number in range(5):
        manager = engine._manager
        real = manager._before_step

        def dies(manager: Any = manager, real: Any = real, number: int = number) -> None:
            if engine._live:
                manager._before_step = real
                raise (SystemExit if number % 2 else MemoryError)("killed")

        manager._before_step = dies
        yield target.post(json=target.body(number))
        yield target.post(json=target.body(number))
    yield f"restarts: {engine.state()['restarts']}"


def store_full(target: Target) -> Iterator[str]:
    store = target.front.blocks.store
    real = store.put

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    store.put = full
    try:
        for number in range(10):
            yield target.post(json=target.body() | {"messages": noise_turn(number)})
    finally:
        store.put = real
    yield f"not stored, and counted: {target.front.blocks.state()['not_stored']}"


def store_pruned(target: Target) -> Iterator[str]:
    blocks = target.front.blocks
    for number in range(10):
        said = target.client.post("/v1/voco/compress", json={"image": target.cases[number % 3][0]})
        key = said.json()["key"]
        blocks.store.prune(0)
        blocks._memory.clear()
        content = [{"type": "voco", "key": key}, {"type": "text", "text": "What is at a1?"}]
        yield target.post(json=target.body() | {"messages": [{"role": "user", "content": content}]})
        yield target.post(json=target.body(number))


def noise_turn(number: int) -> list[dict[str, Any]]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.effect_noise((48, 48 + number), 90).convert("RGB").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is at a1?"}]}]


def malformed(target: Target) -> Iterator[str]:
    bodies = [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "m"}', b'{"messages": {}}', b"[" * 50_000,
        b'{"messages": [{"role": "user", "content": 5}]}', b'{"a": 1e999}', b"NaN", b'{"messages": []}',
    ]  # fmt: skip
    for number in range(1000):
        headers = {"Content-Type": "text/plain" if number % 10 == 9 else "application/json"}
        yield target.post(content=bodies[number % len(bodies)], headers=headers)


def bad_values(target: Target) -> Iterator[str]:
    changes: list[dict[str, Any]] = [
        {"temperature": -1}, {"temperature": "hot"}, {"top_p": 2}, {"max_tokens": 0}, {"max_tokens": 10**12},
        {"n": 99}, {"stop": [""]}, {"logit_bias": {"x": 1}}, {"seed": 1.5}, {"tools": [{}]},
        {"messages": None}, {"model": "another"}, {"top_logprobs": 3}, {"unknown": 1}, {"stream": "yes"},
        {"logit_bias": {"99999999": 1}},
    ]  # fmt: skip
    for number in range(320):
        yield target.post(json=target.body(number) | changes[number % len(changes)])


def image_bombs(target: Target) -> Iterator[str]:
    bombs = [png(60_000, 60_000), png(200_000, 30_000), png(1, 2_000_000_000)]
    for number in range(12):
        image = {"type": "image_url", "image_url": {"url": bombs[number % len(bombs)]}}
        yield target.post(json=target.body() | {"messages": [{"role": "user", "content": [image]}]})


def broken_images(target: Target) -> Iterator[str]:
    whole = base64.b64decode(target.cases[0][0].split(",")[1])
    for number in range(60):
        kinds = (whole[: len(whole) // 2], b"GIF89a", bytes(100), whole[:8] + bytes(200), b"<svg/>")
        url = "data:image/png;base64," + base64.b64encode(kinds[number % len(kinds)]).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
        yield target.post(json=target.body() | {"messages": [{"role": "user", "content": content}]})


def too_large(target: Target) -> Iterator[str]:
    size = target.front.settings.max_body + 1

    def pieces() -> Iterator[bytes]:
        for _ in range(size // 65_536 + 2):
            yield bytes(65_536)

    headers = {"Content-Type": "application/json"}
    yield target.post(content=bytes(size), headers=headers)
    yield target.post(content=pieces(), headers=headers)
    yield target.post(json=target.body(messages=[{"role": "user", "content": "a " * 2000}]))


def slow_bodies(target: Target) -> Iterator[str]:
    host, port = target.url.removeprefix("http://").split(":")
    opened = []
    for _ in range(20):
        one = socket.create_connection((host, int(port)), timeout=30)
        one.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a-key\r\n"
            b"Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n{"
        )
        opened.append(one)
    yield f"meanwhile: {target.right()} of {len(target.cases)} right"
    for one in opened:
        with one:
            said = one.recv(200).split(b"\r\n")[0].decode()
            yield said.split(" ", 1)[1] if " " in said else "closed"


def no_key(target: Target) -> Iterator[str]:
    for number in range(100):
        wrong = ("", "Bearer", "Bearer é", "Bearer nope", "Basic a-key", f"bearer {KEY}x")[number % 6]
        yield target.post(json=target.body(), headers={"Authorization": wrong.encode()})


def forbidden_urls(target: Target) -> Iterator[str]:
    urls = [
        "http://127.0.0.1/a.png", "http://localhost:22/", "http://[::1]/a.png", "http://169.254.169.254/latest",
        "http://10.0.0.1/a", "http://0x7f000001/", "http://2130706433/", "http://0177.0.0.1/",
        "http://[::ffff:127.0.0.1]/", "http://user@127.0.0.1/", "http://allowed.test@127.0.0.1/",
        "file:///etc/passwd", "/etc/passwd", "ftp://example.org/a.png", "gopher://127.0.0.1:11211/",
        "http://allowed.test/loopback.png", "http://allowed.test/redirect.png", "dict://127.0.0.1:6379/info",
    ]  # fmt: skip
    for number in range(90):
        image = {"type": "image_url", "image_url": {"url": urls[number % len(urls)]}}
        content = [image, {"type": "text", "text": "?"}]
        yield target.post(json=target.body() | {"messages": [{"role": "user", "content": content}]})


def flood(target: Target) -> Iterator[str]:
    """More at once than may run and wait."""
    found: list[str] = []

    def one(number: int) -> None:
        found.append(target.post(json=target.body(number, max_tokens=64, n=8)))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield from found


FAULTS: dict[str, Callable[[Target], Iterator[str]]] = {
    "client gone, before and in the stream": client_gone,
    "engine's thread killed, out of memory": engine_killed,
    "disk full": store_full,
    "store pruned under it": store_pruned,
    "bodies that are no request": malformed,
    "values out of range, unknown fields": bad_values,
    "decompression bombs": image_bombs,
    "broken images": broken_images,
    "bodies and prompts too large": too_large,
    "slow bodies": slow_bodies,
    "no key, a wrong one": no_key,
    "forbidden URLs (private, redirected, by name)": forbidden_urls,
    "sixty requests of eight answers at once": flood,
}


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Target]:
    demo = write_demo("gridworld", folder / "gridworld")
    model, processor = vp.load(demo.model)
    cases = []
    from PIL import Image

    for file, question, _ in demo.examples:
        picture = Image.open(file).convert("RGB")
        (text,) = vp.answer(
            model.eval(), processor, [question],
            caches=list(vp.compress_images(model, processor, [picture])), max_new_tokens=16,
        )  # fmt: skip
        url = "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode()
        cases.append((url, question, text.strip()))
    settings = ServerSettings(
        api_keys=(KEY,), allowed_hosts=("allowed.test",), body_seconds=3, request_seconds=60, drain_seconds=5,
        max_running=16, max_waiting=64,
    )  # fmt: skip
    parts = ServerParts(store=str(folder / "store"), kv_bytes=1 << 26)
    with assemble(model, processor, "m", settings, parts) as app:
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.bind(("127.0.0.1", 0))
        server = server_of(app, port=0)
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield Target(app, f"http://127.0.0.1:{listening.getsockname()[1]}", cases)
        finally:
            server.should_exit = True
            thread.join(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="faults whose name holds this")
    parser.add_argument("--out", help="JSON of the result")
    args = parser.parse_args()
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as name, serving(Path(name)) as target:
        before = target.right()
        print(f"before: {before} of {len(target.cases)} right")
        for fault, run in FAULTS.items():
            if args.only and args.only not in fault:
                continue
            start = time.perf_counter()
            outcomes = collections.Counter(run(target))
            right = target.right()
            up = target.client.get("/health").status_code == 200
            server_errors = sum(n for what, n in outcomes.items() if what.startswith("500"))
            bad += right != len(target.cases) or not up or server_errors > 0
            rows.append(
                {"fault": fault, "outcomes": dict(outcomes), "right_after": right,
                 "asked_after": len(target.cases), "up": up, "seconds": time.perf_counter() - start}
            )  # fmt: skip
            said = ", ".join(f"{n} × {what}" for what, n in outcomes.most_common(6))
            print(f"{fault}: {said}; after it {right} of {len(target.cases)} right, {'up' if up else 'DOWN'}")
    result = {"before": before, "faults": rows, "environment": environment("cpu")}
    if args.out:
        atomic_write_text(args.out, json.dumps(result, indent=2) + "\n")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
