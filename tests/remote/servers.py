"""A server on this machine that answers by a script, and remembers what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server answers: a JSON value, or bytes as they are."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0
    """So many bytes of the body are announced and never sent."""
    silent: bool = False
    """Nothing is answered until the test is over."""


@dataclass
class Server:
    """Where it is, and what it was asked: (path, headers, body) of every request."""

    url: str
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


Script = Callable[[str, dict[str, Any], int], Reply]
"""(path, body, number of the request) → answer."""


def chat(text: str | None) -> Reply:
    return Reply({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})


@contextlib.contextmanager
def serving(script: Script) -> Iterator[Server]:
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, dict(self.headers), body))
            reply = script(self.path, body, len(server.asked))
            if reply.silent:
                over.wait(30)
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) - reply.cut])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_port}/v1")
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        over.set()
        http.shutdown()
        http.server_close()
