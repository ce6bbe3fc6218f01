"""A server whose engine says what a test wants, over the tiny model's real stage 1 and real processor."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
from PIL import Image

from sessions import made
from voco_plugin.cache import VoCoCache
from voco_plugin.inference.answering import compress_images
from voco_plugin.serving.blocks import Blocks, Compressed, UnknownKeyError
from voco_plugin.serving.engines.request import (
    Answer,
    Engine,
    EngineError,
    EngineRequest,
    Step,
    check_length,
)
from voco_plugin.serving.http.app import create_app
from voco_plugin.serving.http.server import server_of
from voco_plugin.serving.http.settings import ServerSettings

NAME = "tiny/llava"
_MADE: dict[str, tuple] = {}


def pair(name: str = "llava_llama") -> tuple:
    """An attached tiny model and its processor, made once."""
    if name not in _MADE:
        _MADE[name] = made(name)
    return _MADE[name]


class FakeAnswer(Answer):
    """Knows whether it was cancelled before it ended."""

    left = False

    def cancel(self) -> None:
        if not self._over:
            self.left = True
        super().cancel()


class FakeEngine(Engine):
    """Says ``text``, a token every ``delay`` seconds, or whatever ``script`` says to a request.

    ``script`` gives texts, token ids, seconds to wait, an ``Exception`` to fail with, or a finish reason.
    """

    name, max_positions = "fake", 512

    def __init__(self, tokenizer, text: str = "a red square") -> None:
        self.tokenizer, self.text, self.delay = tokenizer, text, 0.0
        self.script: Callable[[EngineRequest], list] = lambda request: [self.text]
        self.requests: list[EngineRequest] = []
        self.answers: list[FakeAnswer] = []
        self.started = self.stopped = self.dead = False
        self._tasks: set[asyncio.Task] = set()

    def start(self) -> None:
        self.started = True

    def check(self, request: EngineRequest) -> None:
        check_length(request, self.max_positions)

    def submit(self, request: EngineRequest) -> Answer:
        if self.dead:
            raise EngineError("it was killed.")
        answer = FakeAnswer()
        self.requests.append(request)
        self.answers.append(answer)
        task = asyncio.get_running_loop().create_task(self._say(request, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    async def _say(self, request: EngineRequest, answer: FakeAnswer) -> None:
        said, alternatives = 0, request.sampling.logprobs
        answer.queued_seconds = 0.0
        for event in self.script(request):
            if isinstance(event, Exception):
                answer.fail(event)
            elif isinstance(event, float):
                await asyncio.sleep(event)
                continue
            elif isinstance(event, str) and event.startswith("finish:"):
                answer.end(event.removeprefix("finish:"))
            for token in self._ids(event):
                await asyncio.sleep(self.delay)
                if said == request.sampling.max_new_tokens or answer._over:
                    break
                said += 1
                others = tuple((token + i, -0.5 - i) for i in range(alternatives or 0))
                answer.put(Step(token, None if alternatives is None else -0.5, others))
        full = said == request.sampling.max_new_tokens
        answer.end("length" if full else "stop")

    def _ids(self, event) -> list[int]:
        if isinstance(event, str) and not event.startswith("finish:"):
            return self.tokenizer(event, add_special_tokens=False)["input_ids"]
        return [event] if isinstance(event, int) else []

    def stop(self, drain_seconds: float = 0.0) -> None:
        self.stopped = True

    def state(self) -> dict:
        if self.dead:
            return {"ready": False, "running": 0, "waiting": 0, "restarts": 1, "error": "it was killed."}
        running = sum(not answer._over for answer in self.answers)
        return {"ready": True, "running": running, "waiting": 0, "restarts": 0, "error": None}


class FakeBlocks(Blocks):
    """Stage 1 of the tiny model, kept in a dictionary."""

    num_tokens = 2

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model, processor
        self.kept: dict[str, Compressed] = {}
        self.hits = self.misses = 0
        self.delay = 0.0
        self.started = self.stopped = False

    async def of_image(self, image, num_tokens=None) -> Compressed:
        return await self._of([image], num_tokens, None)

    async def of_video(self, frames, num_tokens=None) -> Compressed:
        times = tuple(f"{frame.time:.1f}s: " for frame in frames)
        return await self._of([frame.image for frame in frames], num_tokens, times)

    async def _of(self, images, num_tokens, times) -> Compressed:
        await asyncio.sleep(self.delay)
        if num_tokens is not None and num_tokens > 64:
            raise ValueError(f"num_tokens={num_tokens} is more than this model gives; give 64 at most.")
        data = b"".join(image.tobytes() for image in images) + bytes([num_tokens or 0, times is not None])
        key = hashlib.sha256(data).hexdigest()
        hit = key in self.kept
        self.hits, self.misses = self.hits + hit, self.misses + (not hit)
        if not hit:
            caches = [*compress_images(self.model, self.processor, images, num_tokens=num_tokens)]
            keys = tuple(hashlib.sha256(f"{key}{i}".encode()).hexdigest() for i in range(len(caches)))
            keys = (key,) if times is None else keys
            self.kept[key] = Compressed(key, VoCoCache.cat(caches), keys, times, False, 0.01)
        return self.kept[key]._replace(hit=hit)

    async def of_key(self, key: str) -> Compressed:
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise ValueError(f"key={key[:80]!r} is not 64 hex digits; give one that the server gave.")
        if key not in self.kept:
            raise UnknownKeyError(f"no image is kept under {key}; send it again.")
        self.hits += 1
        return self.kept[key]._replace(hit=True)

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.stopped = True

    def state(self) -> dict:
        kept = sum(one.cache.nbytes for one in self.kept.values())
        return {
            "waiting": 0, "hits": self.hits, "misses": self.misses, "compressed_seconds": 0.5,
            "kept_bytes": kept,
        }  # fmt: skip


class Server:
    """An app over fakes, and what its parts have seen."""

    def __init__(self, family: str = "llava_llama", fetcher=None, **settings) -> None:
        self.model, self.processor = pair(family)
        self.engine = FakeEngine(self.processor.tokenizer)
        self.blocks = FakeBlocks(self.model, self.processor)
        self.settings = ServerSettings(**settings)
        self.app = create_app(
            self.settings, self.engine, self.blocks, self.model, self.processor, NAME, fetcher=fetcher
        )
        self.front = self.app.state.front

    @contextlib.asynccontextmanager
    async def client(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://server", headers=headers
        ) as client:
            yield client

    def post(self, path: str, body, **headers: str) -> httpx.Response:
        """One request, in an event loop of its own."""

        async def once() -> httpx.Response:
            async with self.client(**headers) as client:
                if isinstance(body, (bytes, str)):
                    content = {"content": body, "headers": {"Content-Type": "application/json"}}
                    return await client.post(path, **content)
                return await client.post(path, json=body)

        return asyncio.run(once())

    def get(self, path: str, **headers: str) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.client(**headers) as client:
                return await client.get(path)

        return asyncio.run(once())

    def chat(self, messages="What?", **fields) -> httpx.Response:
        """A chat of one user's turn, or of ``messages``."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.post("/v1/chat/completions", {"model": NAME, "messages": messages, **fields})

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """The address of a real server of it, on loopback."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            server = server_of(self.app)
            thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
            thread.start()
            while not server.started:
                time.sleep(0.005)
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}"
            finally:
                server.should_exit = True
                thread.join(10)
                assert not thread.is_alive()


def events(answer: httpx.Response) -> list:
    """What a stream holds; its last event is ``[DONE]``, or an error."""
    found = []
    for block in answer.text.split("\n\n"):
        data = [line.removeprefix("data: ") for line in block.split("\n") if line.startswith("data: ")]
        found += [one if one == "[DONE]" else json.loads(one) for one in data]
    return found


def picture(tone: int = 90, size: tuple[int, int] = (20, 16), kind: str = "PNG") -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.new("RGB", size, (tone, 40, 200)).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(*tones: int, text: str = "What is this?") -> list:
    """A user's turn with an image of each tone, and a question."""
    parts: list = [{"type": "image_url", "image_url": {"url": data_url(picture(tone))}} for tone in tones]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def waited(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether ``condition`` came to be."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.005)
    return condition()
