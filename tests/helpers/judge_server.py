"""A local server in the place of a judge."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

YES = '{"correct": "yes", "score": 5}'


NO = '{"correct": "no", "score": 1}'


class Server:
    """Replies to each request with what `script(number, text)` says: a text, a status, or seconds to wait."""

    def __init__(self) -> None:
        self.script = lambda number, text: YES
        self.seen: list[dict] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.seen.append({"path": self.path, **body})
                    outer.keys.append(self.headers.get("Authorization"))
                    number = len(outer.seen) - 1
                said = outer.script(number, body["messages"][1]["content"])
                if isinstance(said, float):
                    time.sleep(said)
                    said = YES
                if isinstance(said, bytes):
                    self._send(200, said)
                elif isinstance(said, int):
                    self._send(said, b"no such model" if said == 404 else b"busy")
                else:
                    self._send(200, json.dumps({"choices": [{"message": {"content": said}}]}).encode())

            def _send(self, status: int, data: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the judge has given up waiting

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
