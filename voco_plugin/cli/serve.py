"""``voco serve``: a model behind the API of OpenAI, images compressed once."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import sys
from typing import Any

from . import output
from .inputs import load_model, positive
from .preconditions import check_packages
from .shipped_models import model_source
from .store import size

_KEY = "VOCO_API_KEY"
_LIMITS = (
    "max_running", "max_waiting", "max_tokens", "max_images", "max_num_tokens", "max_body",
    "request_seconds", "drain_seconds",
)  # fmt: skip


def add(subparsers: Any, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "serve",
        parents=[common],
        help="serve a model over HTTP, with the API of OpenAI",
        description="Answer /v1/chat/completions (streamed or not), /v1/completions and /v1/models as "
        "OpenAI's API does,\nso that its client works unchanged; compress images once (/v1/voco/compress), "
        "answer by their keys;\n/health, /metrics. Without a key only this machine can reach it. By name, a "
        "small model that\nships: gridworld, pictures.",
        epilog="examples:\n  voco serve gridworld\n"
        "  voco serve runs/voco_lora --store caches/ --port 8000\n"
        f"  {_KEY}=secret voco serve runs/voco_lora --host 0.0.0.0 --store caches/\n"
        "  voco serve runs/voco_lora --store caches/ --engine vllm --vllm-url http://127.0.0.1:8001\n",
    )
    parser.add_argument("model", metavar="CHECKPOINT", help="a VoCo checkpoint or adapter, or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address (%(default)s: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="(%(default)s)")
    parser.add_argument("--name", help="what clients call the model (default: the checkpoint's last part)")
    parser.add_argument(
        "--api-key", action="append", metavar="KEY",
        help=f"lets in; more than once for several (or {_KEY}, which no process list shows)",
    )  # fmt: skip
    parser.add_argument(
        "--engine", choices=("embedded", "vllm"), default="embedded",
        help="embedded: transformers' continuous batching in this process (default); vllm: another server",
    )  # fmt: skip
    parser.add_argument("--vllm-url", metavar="URL", help="of --engine vllm: its API server")
    parser.add_argument("--vllm-api-key", metavar="KEY", help="of --engine vllm, where it has one")
    parser.add_argument(
        "--store", metavar="DIR", help="a store to keep blocks in; made where it is not there"
    )
    parser.add_argument("--readonly", action="store_true", help="read the store, and never write to it")
    parser.add_argument("--store-max-bytes", type=size, metavar="SIZE", help="the store's limit: 20GB")
    parser.add_argument("--num-tokens", type=positive, metavar="K", help="VoCo tokens an image (the model's)")
    parser.add_argument(
        "--time-text",
        action="store_true",
        help="write <12.0s> before each frame of a video, as it was trained",
    )
    parser.add_argument(
        "--allow-host", action="append", metavar="HOST",
        help="a host that images may be fetched from, name or *.suffix (default: none)",
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--kv-memory", type=size, default=1 << 30, metavar="SIZE", help="of the engine (1GiB)"
    )
    limits.add_argument(
        "--block-memory", type=size, default=256 << 20, metavar="SIZE", help="blocks kept (256MiB)"
    )
    limits.add_argument("--max-memory", type=size, metavar="SIZE", help="working memory of a compression")
    limits.add_argument("--max-running", type=positive, metavar="N", help="answers at a time (64)")
    limits.add_argument(
        "--max-waiting", type=positive, metavar="N", help="answers that wait; more get 429 (64)"
    )
    limits.add_argument("--max-tokens", type=positive, metavar="N", help="of one answer (4096)")
    limits.add_argument("--max-images", type=positive, metavar="N", help="of one request (16)")
    limits.add_argument("--max-num-tokens", type=positive, metavar="K", help="that a request asks for (64)")
    limits.add_argument("--max-body", type=size, metavar="SIZE", help="of one request (32MiB)")
    limits.add_argument("--request-seconds", type=float, metavar="S", help="of one request (300)")
    limits.add_argument("--drain-seconds", type=float, metavar="S", help="what runs gets at the end (30)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="default: the checkpoint's"
    )
    parser.add_argument(
        "--plugin", action="append", metavar="FILE", help="a Python file that registers components"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    parser.add_argument(
        "--out", metavar="FOLDER", help="where a model that ships is written (runs/demo_NAME)"
    )


def run(args: argparse.Namespace) -> int:
    check_packages(
        dict.fromkeys(("fastapi", "uvicorn", "prometheus_client", "httpx"), "'voco_plugin[serve]'"),
        "voco serve",
    )
    keys = _keys(args)
    _check(args, keys)
    sockets = [_listening(args.host, args.port)]  # before a model is loaded for nothing
    try:
        return _serve(args, keys, sockets)
    finally:
        sockets[0].close()


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    found = [*(args.api_key or []), *([os.environ[_KEY]] if os.environ.get(_KEY) else [])]
    if any(not key.strip() or not key.isascii() or key != key.strip() for key in found):
        raise ValueError("--api-key is empty, or holds what no header carries; give letters and digits.")
    return tuple(dict.fromkeys(found))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    """Refuse what does not go together, before anything is loaded."""
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port {args.port} is none: give 1 to 65535, or 0 for any that is free.")
    if not keys and not _is_loopback(args.host):
        raise ValueError(
            f"--host {args.host} lets other machines in, and there is no key: give --api-key KEY (or "
            f"{_KEY}), or leave --host out."
        )
    if (args.engine == "vllm") != (args.vllm_url is not None):
        raise ValueError("--engine vllm and --vllm-url URL go together.")
    if args.vllm_api_key and not args.vllm_url:
        raise ValueError("--vllm-api-key is of --engine vllm; leave it out.")
    if args.engine == "vllm" and not args.store:
        raise ValueError("--engine vllm reads blocks out of a store: give --store DIR.")
    for name in ("readonly", "store_max_bytes"):
        if getattr(args, name) and not args.store:
            raise ValueError(f"--{name.replace('_', '-')} is of a store: give --store DIR, or leave it out.")
    if args.readonly and args.store_max_bytes:
        raise ValueError("--store-max-bytes is the writer's; leave it out with --readonly.")
    if args.readonly and args.engine == "vllm":
        raise ValueError("--engine vllm needs what is compressed in the store: leave --readonly out.")


def _listening(host: str, port: int) -> Any:
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once on sockets that say TCP; on others each waits 40 ms
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as problem:
        made.close()
        raise OSError(
            f"no server at {host}:{port} ({problem.strerror or problem}); give another --port (0: any)."
        ) from problem
    return made


def _serve(args: argparse.Namespace, keys: tuple[str, ...], sockets: list[Any]) -> int:
    name, source, _ = model_source(args.model, args.out, "voco serve")
    model, processor = load_model(args, source=source)
    model.eval()
    from ..serving.assemble import ServerParts, assemble
    from ..serving.http.logs import write_logs
    from ..serving.http.server import run_server
    from ..serving.http.settings import ServerSettings

    local = _is_loopback(args.host)
    limits = {name: getattr(args, name) for name in _LIMITS if getattr(args, name) is not None}
    limits.setdefault("max_running", 64)
    settings = ServerSettings(
        api_keys=keys, allowed_hosts=tuple(args.allow_host or ()),
        host_names=("localhost", "127.0.0.1", "[::1]", "::1", args.host) if local and not keys else (),
        **limits,
    )  # fmt: skip
    parts = ServerParts(
        store=args.store, readonly=args.readonly, store_max_bytes=args.store_max_bytes,
        num_tokens=args.num_tokens, kv_bytes=args.kv_memory, block_bytes=args.block_memory,
        max_memory=args.max_memory, time_text=args.time_text, vllm_url=args.vllm_url,
        vllm_api_key=args.vllm_api_key,
    )  # fmt: skip
    with assemble(model, processor, args.name or name, settings, parts) as app:
        host, port = sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        output.emit(f"http://{shown}:{port}/v1")
        output.note(
            "no key: only this machine can reach it"
            if not keys
            else f"{len(keys)} key{'s' if len(keys) > 1 else ''}: Authorization: Bearer KEY"
        )
        handler = write_logs(sys.stderr)
        # uvicorn raises again what ended it, once everything has ended
        before = {sign: signal.signal(sign, lambda *_: None) for sign in (signal.SIGINT, signal.SIGTERM)}
        try:
            run_server(app, sockets=sockets)
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            for sign, handler_before in before.items():
                signal.signal(sign, handler_before)
            for logger in ("voco_plugin", "uvicorn"):
                logging.getLogger(logger).removeHandler(handler)
    return 0
