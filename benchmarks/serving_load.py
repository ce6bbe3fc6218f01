"""`voco serve` under load: a closed loop over loopback, each request with an image of its own and an
answer that is known.

    python benchmarks/serving_load.py MODEL --data test.json --image-folder images/ --out serving_load.json
    python benchmarks/serving_load.py gridworld --data runs/gridworld/test.json \\
        --image-folder runs/gridworld/images --requests 200 --concurrency 1 4

The answers are those of the package itself (`voco_plugin.inference.answering.answer` on caches), computed
first. At each concurrency, workers send one request after the other: an image as a data URL and a question,
by turns streamed and whole, one in ten by key. Counted: answers that differ, requests without an answer,
requests a second, the time to the first token, the server's memory as it goes, and what compressing cost (hit
and miss).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

import voco_plugin as vp
from voco_plugin.benchmark.result_file import environment
from voco_plugin.data.loaders import load_vision_dataset
from voco_plugin.evaluation.metrics import images_of, questions_of
from voco_plugin.files import atomic_write_text
from voco_plugin.inference.answering import answer, compress_images

KEY = "a-key-for-the-benchmark"


def known_answers(args: argparse.Namespace, source: str) -> list[dict[str, Any]]:
    """Questions with their images as data URLs and the package's own answers."""
    model, processor = vp.load(source)
    model.eval()
    dataset = load_vision_dataset(args.data, None, args.image_folder)
    questions = questions_of(dataset)[: args.questions]
    rows = sorted({q.row for q in questions})
    pictures = {row: images_of(dataset[row])[0].convert("RGB") for row in rows}
    caches = dict(zip(rows, compress_images(model, processor, list(pictures.values())), strict=True))
    answers = answer(
        model, processor, [q.text for q in questions], caches=[caches[q.row] for q in questions],
        max_new_tokens=args.max_tokens,
    )  # fmt: skip
    urls = {}
    for row, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        urls[row] = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [
        {"url": urls[q.row], "row": q.row, "question": q.text, "answer": text.strip()}
        for q, text in zip(questions, answers, strict=True)
    ]


class Server:
    """`voco serve` in a process of its own, until the block ends."""

    def __init__(self, args: argparse.Namespace, folder: str, source: str) -> None:
        command = [
            sys.executable, "-m", "voco_plugin", "serve", source, "--port", "0", "--name", "model",
            "--store", f"{folder}/store", "--max-waiting", "256", *args.serve,
        ]  # fmt: skip
        self.log = open(f"{folder}/log", "w")
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={**os.environ, "VOCO_API_KEY": KEY},
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        until = time.monotonic() + 300
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if httpx.get(self.url.removesuffix("/v1") + "/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {Path(folder, 'log').read_text()[-2000:]}")

    def memory(self) -> int:
        """Resident bytes."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0

    def blocks(self) -> dict[str, Any]:
        return httpx.get(self.url.removesuffix("/v1") + "/health").json()["blocks"]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


async def ask(
    client: httpx.AsyncClient, case: dict[str, Any], number: int, max_tokens: int
) -> dict[str, Any]:
    """One request; `{"text", "first", "seconds"}`, or `{"error"}`."""
    image: dict[str, Any] = {"type": "image_url", "image_url": {"url": case["url"]}}
    if number % 10 == 9 and case.get("key"):
        image = {"type": "voco", "key": case["key"]}
    body = {
        "model": "model", "max_tokens": max_tokens, "stream": number % 2 == 0,
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": case["question"]}]}],
    }  # fmt: skip
    start = time.perf_counter()
    first = None
    try:
        if not body["stream"]:
            found = await client.post("/chat/completions", json=body)
            found.raise_for_status()
            text = found.json()["choices"][0]["message"]["content"]
            return {"text": text.strip(), "first": None, "seconds": time.perf_counter() - start}
        text = ""
        async with client.stream("POST", "/chat/completions", json=body) as events:
            events.raise_for_status()
            async for line in events.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return {"error": chunk["error"]["message"]}
                piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
                if piece:
                    first = first or time.perf_counter() - start
                    text += piece
        return {"text": text.strip(), "first": first, "seconds": time.perf_counter() - start}
    except httpx.HTTPError as problem:
        return {"error": f"{type(problem).__name__}: {problem}"}


async def closed_loop(
    server: Server, cases: list[dict[str, Any]], concurrency: int, requests: int, begin: int, tokens: int
) -> dict[str, Any]:
    """`requests` requests by `concurrency` workers; what came of them."""
    numbers = iter(range(begin, begin + requests))
    found: list[dict[str, Any]] = []
    limits = httpx.Limits(max_connections=concurrency)
    headers = {"Authorization": f"Bearer {KEY}"}

    async def work(client: httpx.AsyncClient) -> None:
        for number in numbers:
            case = cases[number % len(cases)]
            found.append({**await ask(client, case, number, tokens), "case": case})

    start = time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits, headers=headers) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
    seconds = time.perf_counter() - start
    lost = [one["error"] for one in found if "error" in one]
    wrong = [one for one in found if "error" not in one and one["text"] != one["case"]["answer"]]
    firsts = sorted(one["first"] for one in found if one.get("first"))
    for one in wrong[:3]:
        print(f"wrong: {one['case']['question']!r}: {one['text']!r}, not {one['case']['answer']!r}")
    for reason in lost[:3]:
        print(f"lost: {reason}")
    return {
        "concurrency": concurrency, "requests": len(found), "wrong": len(wrong), "lost": len(lost),
        "requests_a_second": len(found) / seconds, "seconds": seconds,
        "first_token_median": statistics.median(firsts) if firsts else None,
        "first_token_p95": firsts[int(0.95 * (len(firsts) - 1))] if firsts else None,
    }  # fmt: skip


async def keys_of(server: Server, cases: list[dict[str, Any]]) -> tuple[float, float]:
    """Compress each image twice; median seconds of a miss and of a hit. Cases get their keys."""
    times: dict[bool, list[float]] = {False: [], True: []}
    known: dict[int, str] = {}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, timeout=300, headers=headers) as client:
        for case in cases:
            if case["row"] not in known and len(known) < 50:
                for hit in (False, True):
                    start = time.perf_counter()
                    found = (await client.post("/voco/compress", json={"image": case["url"]})).json()
                    times[hit].append(time.perf_counter() - start)
                    assert found["hit"] == hit, found
                known[case["row"]] = found["key"]
            case["key"] = known.get(case["row"])
    return statistics.median(times[False]), statistics.median(times[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a checkpoint, or a model that ships (gridworld)")
    parser.add_argument("--data", required=True, help="questions with one image each")
    parser.add_argument("--image-folder")
    parser.add_argument("--questions", type=int, help="the first so many only")
    parser.add_argument("--requests", type=int, default=1300, help="at each concurrency (%(default)s)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="last: options of voco serve")
    parser.add_argument("--out", help="JSON of the result")
    args = parser.parse_args()
    source = args.model
    if source == "gridworld":
        from voco_plugin.gridworld.shipped_demos import write_demo

        source = str(write_demo("gridworld", Path("runs/demo_gridworld")).model)
    cases = known_answers(args, source)
    print(f"{len(cases)} questions about {len({c['row'] for c in cases})} images, answers known")
    result: dict[str, Any] = {"model": Path(args.model).name, "levels": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder, Server(args, folder, source) as server:
        result["compress_miss"], result["compress_hit"] = asyncio.run(keys_of(server, cases))
        miss, hit = 1e3 * result["compress_miss"], 1e3 * result["compress_hit"]
        print(f"compress: {miss:.1f} ms a miss, {hit:.1f} a hit")
        done = 0
        for concurrency in args.concurrency:
            left, level = args.requests, []
            while left:
                part = min(left, 500 if not done else args.requests)
                level.append(
                    asyncio.run(closed_loop(server, cases, concurrency, part, done, args.max_tokens))
                )
                done, left = done + part, left - part
                result["memory"].append({"requests": done, "bytes": server.memory()})
            for row in level:
                result["levels"].append(row)
                print(
                    f"{row['concurrency']:3} at a time: {row['requests']:5} requests, {row['wrong']} wrong, "
                    f"{row['lost']} lost, {row['requests_a_second']:7.1f} a second, first token "
                    f"{1e3 * (row['first_token_median'] or 0):.0f} ms (95 %: "
                    f"{1e3 * (row['first_token_p95'] or 0):.0f}), {server.memory() / 1e6:.0f} MB"
                )
        result["blocks"] = server.blocks()
    levels = result["levels"]
    totals = {name: sum(row[name] for row in levels) for name in ("requests", "wrong", "lost")}
    result |= {"totals": totals, "environment": environment("cpu")}
    print(f"{totals['requests']} requests: {totals['wrong']} wrong, {totals['lost']} lost")
    if args.out:
        atomic_write_text(args.out, json.dumps(result, indent=2) + "\n")
    if totals["wrong"] or totals["lost"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
