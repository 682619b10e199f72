"""Starts and stops a server: its socket, and what signals do.

Guarantees that the first SIGTERM or Ctrl-C lets running requests finish while new ones are refused, and that a second
one cancels them and ends the server within about a second.  A server whose engine has stopped ends too.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from redrafter.errors import RedrafterError
from redrafter.server.app import make_app
from redrafter.server.service import Service
from redrafter.utils.interrupt import Interrupted, StoppedRun


class EngineStopped(RedrafterError):
    """The engine's loop ended by an error."""

    status = 1


log = logging.getLogger("redrafter.server")

LAST_WORDS = 1.0
"""Seconds in which cancelled requests may be answered."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which does not listen yet; port 0 takes a free one.

    Raises RedrafterError if the address is in use or does not exist.
    """
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        if bound is not None:
            bound.close()
        reason = (error.strerror or str(error)).lower()
        raise RedrafterError(f"The server cannot use --host {host} --port {port}: {reason}.") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The URL of a socket's address."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains at the first signal.  `on_ready` is called when it accepts connections."""

    def __init__(self, service: Service, on_ready: Callable[[], None] = lambda: None):
        super().__init__(
            uvicorn.Config(
                make_app(service), log_level="warning", access_log=False, server_header=False, lifespan="off"
            )
        )
        self.service, self.on_ready = service, on_ready
        self.second_signal: int | None = None
        self._closing = threading.Thread(target=service.engine.close, daemon=True)

    def serve_on(self, bound: socket.socket) -> None:
        """Serves on a bound socket until a signal arrives and all requests in progress are finished.

        Raises StoppedRun if a second signal arrived before that; the engine is closed then, unless it hangs.  Raises
        EngineStopped if the engine stopped by itself.
        """
        self.run(sockets=[bound])
        if self.second_signal is None and not self.service.engine.alive:
            raise EngineStopped("The engine has stopped because of an error, which is in the log above.")
        if self.second_signal is not None:
            self._closing.join(LAST_WORDS)
            name = signal.Signals(self.second_signal).name
            message = f"Stopped by a second signal ({name}); requests in progress were cancelled."
            raise StoppedRun(message, Interrupted(self.second_signal, forced=True))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen."""
        await super().startup(sockets=sockets)
        self.on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Ends the server if the engine has stopped; its requests have failed then."""
        return await super().on_tick(counter) or not self.service.engine.alive

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handles SIGINT and SIGTERM, in the main thread."""
        if not self.service.draining:
            self.service.draining = True
            threading.Thread(target=self._drain, daemon=True).start()
        elif self.second_signal is None:
            self.second_signal = sig
            self.should_exit = True
            self._closing.start()
            threading.Thread(target=self._force, daemon=True).start()

    def _drain(self) -> None:
        log.info("Draining: requests in progress are finished, new ones are refused.  Another signal stops at once.")
        self.service.engine.drain()
        self.should_exit = True

    def _force(self) -> None:
        time.sleep(LAST_WORDS)
        self.force_exit = True
