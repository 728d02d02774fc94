"""Limits the connections of a server in this process, so that clients never exhaust its file descriptors.

A training process needs descriptors for checkpoints, the journal and dataloader workers. The clients of its server
share a quarter of the descriptor limit, and never occupy the upper quarter of the descriptor numbers.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence

from events.log import logger

MOST_CONNECTIONS = 1_200
"""Maximum connections per server."""
REQUEST_S = 10.0
"""Seconds that a client may take to send a complete request, counted from the accept or the last response."""
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of an accept that an immediate retry repeats."""
_WARNING_S = 60.0
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._~-]+))(?::[0-9]{0,5})?")
_UNLIMITED = 2**20


class ConnectionLimit:
    """Decides which accepted connections a server keeps. Belongs to the thread that accepts.

    Args:
        most: Maximum connections; a quarter of the descriptor limit, if that is less.
    """

    def __init__(self, most: int = MOST_CONNECTIONS) -> None:
        limit = _descriptor_limit()
        self.most = max(2, min(most, limit // 4))
        """Maximum connections at a time."""
        self.most_per_address = (self.most + 1) // 2
        """Maximum connections per remote address. Loopback has no limit of its own: a proxy on this machine connects
        for all clients."""
        self._first_reserved = limit - limit // 4
        self._open: dict[socket.socket, str | None] = {}

    @property
    def count(self) -> int:
        """Open connections, and those closed since the last prune."""
        return len(self._open)

    def is_full(self) -> bool:
        """Whether a further connection must be refused."""
        if self.count >= self.most:
            self._prune()
        return self.count >= self.most

    def is_full_for(self, address: str | None) -> bool:
        """Whether a further connection of an `address_group` must be refused."""
        self._prune()
        return address is not None and list(self._open.values()).count(address) >= self.most_per_address

    def reserves(self, connection: socket.socket) -> bool:
        """Whether a connection has one of the descriptors reserved for the rest of the process.

        The system assigns the lowest free number, so a high one means that nearly all descriptors are in use.
        """
        return sys.platform != "win32" and connection.fileno() >= self._first_reserved

    def add(self, connection: socket.socket, address: str | None) -> None:
        """Count a connection until it is closed."""
        self._open[connection] = address

    def _prune(self) -> None:
        self._open = {one: address for one, address in self._open.items() if one.fileno() != -1}


class RatedWarning:
    """Logs one warning per minute, with the number of those that it suppressed. Any thread.

    Args:
        text: The warning, without that number.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._count = 0
        self._next = -1.0

    def __call__(self, detail: str = "") -> None:
        """Warn, or count."""
        with self._lock:
            self._count += 1
            now = time.monotonic()
            if now < self._next:
                return
            count, self._count, self._next = self._count, 0, now + _WARNING_S
        logger.warning(f"{self._text}{detail}" + (f" ({count:,} times since the last such warning)" * (count > 1)))


class ClientFaults(logging.Filter):
    """Passes one log record per minute and message, so that clients cannot fill a log."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is logged: errors of our own always, errors about malformed requests never."""
        text = str(record.msg)
        if text.startswith("ASGI callable returned without completing"):  # because a client did not read
            return False
        error = record.exc_info[1] if record.exc_info else None
        if type(error).__module__.partition(".")[0] == "h11":  # a request without the end of its body
            return False
        if record.levelno < logging.WARNING or text.startswith("Exception in ASGI"):
            return True
        now = time.monotonic()
        if now < self._next.get(text, -1.0):
            return False
        self._next[text] = now + _WARNING_S
        return True


def address_group(address: object) -> str | None:
    """Return the key by which a client's address is counted: IPv6 by its /64 network; None for loopback."""
    try:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0]) if isinstance(address, Sequence) else None
    except (ValueError, IndexError):
        ip = None
    if ip is None:
        return "unknown"
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_loopback:
        return None
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def hostname_of(host: str) -> str | None:
    """Return the name or address in a ``Host`` header, in lower case and without its port; None for any other text.

    Strict, because access depends on it: brackets hold an IPv6 address only, with nothing but a port behind them.
    """
    found = _HOST.fullmatch(host)
    if found is not None and found["name"] is not None:
        return found["name"].lower()
    try:
        return str(ipaddress.IPv6Address(found["address"] if found is not None else host))
    except ValueError:
        return None


def _descriptor_limit() -> int:
    if sys.platform == "win32":
        return _UNLIMITED
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else min(soft, _UNLIMITED)
