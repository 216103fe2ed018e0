"""A socket, a server on it, and how it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import ServeError, require_extra
from ..logging import get_logger
from .app import Service, build_app

try:
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol
except ImportError as error:
    raise require_extra("uvicorn", "serve", "a server") from error

logger = get_logger(__name__)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_LAST_SECONDS = 10  # that open requests get when the server ends


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to a name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Args:
        host: name or address.
        port: 0 takes any that is free.

    Raises:
        ServeError: if it is taken, or there is no such address.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ServeError(f"cannot listen at {host} port {port}: {error}; choose another --host or --port") from error


def address_of(listener: socket.socket) -> str:
    """The URL of what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """A server that ends its answers when it is told to end."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See `uvicorn.Server`: called by Ctrl-C."""
        self._service.end()
        super().handle_exit(sig, frame)


def _patient_for(seconds: float) -> type[asyncio.Protocol]:
    """A protocol that hangs up on who has not sent the head of a request after some seconds.

    uvicorn waits for it without end, so that a client that sends a byte now and then, or none, holds a connection. The
    body is read by the routes, which have an answer for who is slow.
    """
    known: Any = AutoHTTPProtocol

    class Protocol(known):
        _hang_up: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            self._calm()
            super().connection_lost(error)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
                self._calm()
            elif self._hang_up is None:
                self._hang_up = self.loop.call_later(seconds, self._late)

        def _calm(self) -> None:
            if self._hang_up is not None:
                self._hang_up.cancel()
                self._hang_up = None

        def _late(self) -> None:
            self._hang_up = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Protocol


def _server(service: Service) -> _Server:
    # What uvicorn has to say of each request and of itself concerns no user; what goes wrong, the routes log.
    config = uvicorn.Config(
        build_app(service),
        http=_patient_for(service.limits.sending_seconds),
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    return _Server(config, service)


def run(service: Service, listener: socket.socket) -> None:
    """Serve until Ctrl-C, which is raised again when all answers have ended."""
    try:
        _server(service).run(sockets=[listener])
    finally:
        service.close()
        listener.close()


@contextmanager
def serving(service: Service, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A server in a thread of its own, for the duration of a block (a notebook, a test).

    Args:
        service: what it serves.
        host: name or address.
        port: 0 takes any that is free.

    Returns:
        For ``with``: its URL, without ``/v1``.

    Raises:
        ServeError: if it cannot listen there.
    """
    listener = listening(host, port)
    server = _server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="kedit-serve", daemon=True)
    thread.start()
    try:
        yield address_of(listener)  # connections wait in the socket until the server takes them
    finally:
        service.end()
        server.should_exit = True
        thread.join()
        service.close()
        listener.close()
