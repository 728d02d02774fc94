"""A proxy between a client and an HTTP server that injects faults at chosen places."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

Act = Literal["500", "stall", "reset"] | Callable[[], None]
_END = b"\r\n\r\n"


class Fault(NamedTuple):
    request: int
    """Number of the request, from 0, in the order of arrival."""
    answered: bool
    """The fault happens in the answer, when the server has done its work; or in the request, which never reaches it."""
    fraction: float
    """The part of the answer, or of the request, that passes before the fault."""
    act: Act
    """``500``: the answer. ``stall``: nothing more is sent. ``reset``: the connection is reset. A function: it is
    called, and the request continues."""


class _Gone(Exception):
    """The connection has ended."""


class FaultyProxy:
    """Forwards requests to a server, each on its own connection and thread."""

    def __init__(self, port: int) -> None:
        self.requests: list[str] = []
        """The first lines of all requests."""
        self.fired: list[Fault] = []
        self._faults: list[Fault] = []
        self._upstream = ("127.0.0.1", port)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def arm(self, *faults: Fault) -> None:
        """Count requests from 0 again, with these faults."""
        with self._lock:
            self.requests.clear()
            self.fired.clear()
            self._faults = list(faults)

    def settle(self) -> None:
        """Wait for the end of all requests."""
        while threads := [thread for thread in self._threads if thread.is_alive()]:
            for thread in threads:
                thread.join()
        self._threads.clear()

    def close(self) -> None:
        """Accept no more connections, and wait for the end of the others."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self.settle()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, _Gone):
            head = _until_end(client)
            number = self._number(head)
            fault = next((one for one in self._faults if one.request == number), None)
            early = fault if fault is not None and not fault.answered else None
            body = self._body(client, head, early)
            answer = self._ask(head, body)
            if fault is not None and fault.answered:
                sent = int(len(answer) * fault.fraction) if fault.act != "500" else 0
                client.sendall(answer[:sent])
                self._do(client, fault)
                answer = answer[sent:]
            client.sendall(answer)

    def _number(self, head: bytes) -> int:
        with self._lock:
            self.requests.append(head.split(b"\r\n", 1)[0].decode())
            return len(self.requests) - 1

    def _body(self, client: socket.socket, head: bytes, fault: Fault | None) -> bytes:
        """Read a request's body, which is forwarded completely or not at all, as a real store guarantees."""
        nbytes = _length(head)
        extra = head[head.index(_END) + len(_END) :]
        body = bytearray(extra)
        at = int(nbytes * fault.fraction) if fault is not None and fault.act != "500" else nbytes
        while len(body) < at:
            body += _some(client, at - len(body))
        if fault is not None:
            self._do(client, fault)
        while len(body) < nbytes:
            body += _some(client, nbytes - len(body))
        return bytes(body)

    def _do(self, client: socket.socket, fault: Fault) -> None:
        self.fired.append(fault)
        if fault.act == "500":
            client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif fault.act == "stall":
            while client.recv(65_536):
                pass  # until the client closes
        elif fault.act == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            fault.act()
            return
        raise _Gone

    def _ask(self, head: bytes, body: bytes) -> bytes:
        lines = head[: head.index(_END)].split(b"\r\n")
        lines = [line for line in lines if not line.lower().startswith(b"connection:")]
        with socket.create_connection(self._upstream) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + _END + body)
            answer = bytearray()
            while chunk := server.recv(65_536):
                answer += chunk
        return bytes(answer)


def _until_end(client: socket.socket) -> bytes:
    head = bytearray()
    while _END not in head:
        head += _some(client, 65_536)
    return bytes(head)


def _some(client: socket.socket, nbytes: int) -> bytes:
    data = client.recv(min(nbytes, 65_536))
    if not data:
        raise _Gone
    return data


def _length(head: bytes) -> int:
    for line in head[: head.index(_END)].split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            return int(value)
    return 0
