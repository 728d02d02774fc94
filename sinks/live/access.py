"""Who may see runs over the network, and who may command them."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from events.errors import SinkMisconfigured

Headers = list[tuple[bytes, bytes]]


class Refused(Exception):
    """A request that is answered with no.

    Attributes:
        status: For HTTP.
        code: For WebSocket.
    """

    def __init__(self, status: int, reason: str, *, code: int = 1008, headers: Headers | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.code = code
        self.headers = headers or []


class Access:
    """Checks requests.

    Args:
        token: Who does not show it sees nothing but the empty page. None: whoever reaches the server may look.
        commands: Whether those who may see runs may also command them.
        origins: Sites whose pages may talk to this server, beside its own (``https://example.org``).
        hosts: Names under which the server is asked for; None: any. Where there is no token, name them: a page of a
            stranger could else make a name of his own lead here (DNS rebinding).

    Raises:
        SinkMisconfigured: The token is one that could be guessed, or that no header can carry.
    """

    def __init__(
        self,
        token: str | None = None,
        *,
        commands: bool = False,
        origins: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
    ) -> None:
        check_token_text(token)
        self._token = token.encode() if token is not None else None
        self.commands = commands
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    def allows(self, token: str | None) -> bool:
        """Whether this is the token, if there is one. Takes as long for every wrong one of its length."""
        shown = (token or "").encode("utf-8", "surrogatepass")
        return self._token is None or hmac.compare_digest(shown, self._token)

    def __repr__(self) -> str:
        return f"Access(token={'...' if self._token else None}, commands={self.commands})"

    def check_token(self, scope: MutableMapping[str, Any]) -> None:
        """See that a request carries the token. Raises `Refused`."""
        scheme, _, token = _header(scope, b"authorization").partition(" ")
        if not self.allows(token.strip() if scheme.lower() == "bearer" else None):
            raise Refused(401, "this server wants its token", headers=[(b"www-authenticate", b"Bearer")])

    def check_request(self, scope: MutableMapping[str, Any]) -> None:
        """See that a request comes from a page of this server, of an allowed one, or from none. Raises `Refused`."""
        host = _header(scope, b"host").lower()
        if self._hosts is not None and _hostname(host) not in self._hosts:
            raise Refused(421, "this server is not known under the name that it was asked for")
        origin = _header(scope, b"origin").rstrip("/").lower()
        if origin and origin not in self._origins and not (host and _place(origin) == host):
            raise Refused(403, "a page of another site asks: this server has not been told to trust it")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_token_text(token: str | None) -> None:
    """See that a token, if there is one, protects. Raises `SinkMisconfigured`, which does not show it."""
    if token is not None and len(token) < 8:
        raise SinkMisconfigured("the token is too short: give at least 8 characters that nobody guesses")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise SinkMisconfigured("the token has characters that no header carries: give letters, digits and signs")


def check_host(host: str, token: str | None) -> None:
    """See that what others can reach has a token.

    Raises:
        SinkMisconfigured: It has none, or a bad one.
    """
    check_token_text(token)
    if token is None and not is_loopback(host):
        raise SinkMisconfigured(
            f"at {host} other machines can reach the server: give a token that they have to show (token=, or the"
            f" environment variable STAGECAST_TOKEN), or serve at 127.0.0.1"
        )


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:  # a bracket too many
        return None


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0].strip("[")
    return host.partition(":")[0]


def _header(scope: MutableMapping[str, Any], name: bytes) -> str:
    value: bytes = next((value for key, value in scope["headers"] if key.lower() == name), b"")
    return value.decode("latin-1")
