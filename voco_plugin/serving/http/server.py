"""``run_server``: the app on a port, until it is told to stop."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from .front import Front


class _Server(uvicorn.Server):
    """On the first signal no new request is taken, and what runs may end."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        front: Front = self.config.app.state.front  # type: ignore[union-attr]
        front.queue.draining = True
        super().handle_exit(sig, frame)


def server_of(app: FastAPI, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Server:
    """The app's server, not started: ``run()`` blocks until a signal, ``serve()`` is a coroutine.

    What runs when it is told to stop has ``drain_seconds`` to end.
    """
    front: Front = app.state.front
    settings = front.settings
    config = uvicorn.Config(
        app, host=host, port=port, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)), timeout_keep_alive=30,
        # beyond requests that may run and wait, some that are refused and some that ask for the health
        limit_concurrency=4 * front.queue.size + 64, lifespan="on",
    )  # fmt: skip
    return _Server(config)


def run_server(
    app: FastAPI, host: str = "127.0.0.1", port: int = 8000, sockets: list[socket.socket] | None = None
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        sockets: listening ones, instead of host and port.

    Raises:
        SystemExit: the app did not start, or the port is taken.
    """
    server_of(app, host, port).run(sockets)


__all__ = ["run_server", "server_of"]
