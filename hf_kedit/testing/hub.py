"""A Hugging Face Hub on this machine: the unmodified client, ``hf``, peft, datasets and evaluate work against it.

    with LoopbackHub() as hub:                      # in this process, on a free port
        HfApi(endpoint=hub.endpoint, token=hub.token()).create_repo("org/model")

    python -m hf_kedit.testing.hub                  # stays until Ctrl-C, and prints the variables to export

Libraries read the address of the Hub when they are imported: set `LoopbackHub.environment` before that, or start a
second Python with it. Everything is kept in memory, and nothing leaves the machine.
"""

from __future__ import annotations

import argparse
import http.server
import sys
import threading
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .repos import HubFault
from .routes import Answer, Call, answer
from .state import ORGANISATION, USER, HubState


class LoopbackHub(HubState):
    """A Hub with users, organisations and repositories, served by a thread of this process.

    Args:
        users: names; the first one is the default of `token`.
        orgs: organisation → the users in it. A namespace that is neither cannot be written to.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        users: Collection[str] = (USER,),
        orgs: Mapping[str, Collection[str]] | None = None,
        *,
        port: int = 0,
    ):
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        super().__init__(f"http://127.0.0.1:{self._server.server_port}", users, orgs)
        self._thread = threading.Thread(target=self._server.serve_forever, name="loopback hub", daemon=True)

    def environment(self, home: str, user: str | None = None) -> dict[str, str]:
        """The variables with which a program works against this Hub.

        Args:
            home: folder for its caches.
            user: who it is.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token(user),
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def start(self) -> LoopbackHub:
        """Begin to answer."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop, and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: LoopbackHub


class _Handler(http.server.BaseHTTPRequestHandler):
    """Turns HTTP into a `Call` and an `Answer` into HTTP."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: `LoopbackHub.requests` has the log."""

    def _handle(self) -> None:
        address = urlsplit(self.path)
        body = self._read()  # in any case: what stays unread would be taken for the next request
        hub = self.server.hub
        with hub.lock:
            hub.requests.append((self.command, address.path))
            try:
                headers = {name.lower(): value for name, value in self.headers.items()}
                scheme, _, token = headers.get("authorization", "").partition(" ")
                user = hub.owner_of(token) if scheme == "Bearer" else None
                query = dict(parse_qsl(address.query, keep_blank_values=True))
                reply = answer(Call(hub, self.command, address.path, query, headers, body, user))
            except HubFault as fault:
                reply = _refusal(fault)
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read(self) -> bytes:
        """The body, whether its length was announced or it comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers, up to the empty line
            pass
        return b"".join(parts)

    def _send(self, reply: Answer) -> None:
        body = reply.body()
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", **reply.headers, "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _refusal(fault: HubFault) -> Answer:
    message = str(fault)
    headers = {**fault.headers, "X-Error-Message": message.encode("ascii", "replace").decode().replace("\n", " ")}
    if fault.code:
        headers["X-Error-Code"] = fault.code
    return Answer({"error": message, **fault.data}, fault.status, headers)


def main(arguments: list[str] | None = None) -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m hf_kedit.testing.hub", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8199, help="0 takes a free one (default: 8199)")
    parser.add_argument("--home", default="~/.cache/kedit-loopback-hub", help="folder for the caches of clients")
    parser.add_argument("--user", action="append", help="a user; may be repeated (default: user)")
    parser.add_argument("--org", action="append", help="an organisation that all users are in (default: org)")
    chosen = parser.parse_args(arguments)
    users = tuple(chosen.user or (USER,))
    hub = LoopbackHub(users, dict.fromkeys(chosen.org or (ORGANISATION,), users), port=chosen.port)
    lines = [f"export {name}={value}" for name, value in hub.environment(chosen.home).items()]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    with hub:
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.stderr.write("stopped\n")


if __name__ == "__main__":
    main()
