"""Access to runs over the network: tokens, hosts, origins, and a check of the host application."""

from __future__ import annotations

import contextlib
import hmac
import inspect
import ipaddress
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import anyio
import anyio.to_thread

from events.errors import SinkMisconfigured
from events.log import logger

TOKEN_VARIABLE = "STAGECAST_TOKEN"
"""Environment variable with the token, for servers and clients."""
Headers = list[tuple[bytes, bytes]]
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._~-]+))(?::[0-9]{0,5})?")
_MOST_CHECKS = 8
"""Maximum synchronous checks at a time, each on a thread."""


class Refused(Exception):
    """A refused request; a check of `Access` may raise it too.

    Attributes:
        status: For HTTP, 401 or 403 for instance.
        reason: Shown to the client.
        code: For WebSocket.
        headers: Of the response.
    """

    def __init__(self, status: int, reason: str, *, code: int = 1008, headers: Headers | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.code = code
        self.headers = headers or []


@dataclass(frozen=True)
class Request:
    """A request, for the check of a host application. A command by WebSocket looks like a posted one."""

    method: str
    """``GET``, ``HEAD``, ``POST`` or any other; ``WEBSOCKET`` for a handshake."""
    path: str
    """Below the mount point, decoded, without slashes at its ends: ``api/runs/line/events``."""
    scope: Mapping[str, Any] = field(repr=False)
    """The ASGI scope, with the entries of the host's middleware: ``request.scope["user"]``."""

    @property
    def run_id(self) -> str | None:
        """The requested run; None for the page and the list of runs."""
        return self.path.split("/")[2] if self.path.startswith("api/runs/") else None

    @property
    def command(self) -> bool:
        """Whether the request is a command: pause, stop, take a checkpoint."""
        return self.run_id is not None and self.path.split("/")[3:] == ["commands"]

    @cached_property
    def headers(self) -> Mapping[str, str]:
        """Names in lower case; a header that comes several times is joined by commas."""
        joined: dict[str, str] = {}
        for key, value in self.scope["headers"]:
            name, text = key.decode("latin-1").lower(), value.decode("latin-1")
            joined[name] = f"{joined[name]}, {text}" if name in joined else text
        return joined

    @cached_property
    def cookies(self) -> Mapping[str, str]:
        """By name; empty if the header is malformed."""
        try:
            return {name: one.value for name, one in SimpleCookie(self.headers.get("cookie", "")).items()}
        except CookieError:
            return {}

    @cached_property
    def query(self) -> Mapping[str, str]:
        """Parameters of the address; the last value of each name."""
        return dict(parse_qsl(self.scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))

    @property
    def client(self) -> str | None:
        """Address of the client, or of the proxy; None if the server does not know it."""
        client = self.scope.get("client")
        return str(client[0]) if client else None


Check = Callable[[Request], "bool | Awaitable[bool]"]


class Access:
    """Checks requests.

    Args:
        token: Required of every client; without it a client receives the empty page only. None: every client that
            reaches the server may see the runs.
        commands: Whether clients may also command the runs.
        origins: Further sites whose pages may use this server (``https://example.org``). Their names are also hosts.
        hosts: Allowed names in the Host header; None: any. Without a token, name them: a foreign page could otherwise
            point a name of its own at this server (DNS rebinding).
        check: The host application's check of pages, runs, streams, WebSockets and commands, in addition to the token.
            Receives a `Request`; True allows it, any other value refuses it with 403, and so does an exception, which
            is logged. `Refused`, and exceptions with a ``status_code`` of 401 or 403, such as FastAPI's and
            Starlette's, refuse with their own status. It may be ``async``; a synchronous check runs on a thread, at
            most 8 at a time. It runs when a connection is opened, and for each command.

    Raises:
        SinkMisconfigured: The token is too short, or has characters that a header cannot carry.
    """

    def __init__(
        self,
        token: str | None = None,
        *,
        commands: bool = False,
        origins: Iterable[str] = (),
        hosts: Iterable[str] | None = None,
        check: Check | None = None,
    ) -> None:
        check_token_text(token)
        self._token = token.encode() if token is not None else None
        self.commands = commands
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        named = {name for origin in self._origins if (name := hostname_of(_place(origin) or "")) is not None}
        # A name that is not a host name stays: it matches no request.
        self._hosts = None if hosts is None else {hostname_of(host) or host.lower() for host in hosts} | named
        self._check = check
        self._threads = anyio.CapacityLimiter(_MOST_CHECKS)  # our own: a slow check must not occupy the host's threads

    def allows(self, token: str | None) -> bool:
        """Whether this is the token, if one is required; in constant time."""
        shown = (token or "").encode("utf-8", "surrogatepass")
        return self._token is None or hmac.compare_digest(shown, self._token)

    def __repr__(self) -> str:
        return f"Access(token={'...' if self._token else None}, commands={self.commands})"

    def check_token(self, scope: MutableMapping[str, Any]) -> None:
        """Raise `Refused` for a request without the token."""
        scheme, _, token = _header(scope, b"authorization").partition(" ")
        if not self.allows(token.strip() if scheme.lower() == "bearer" else None):
            raise Refused(401, "this server wants its token", headers=[(b"www-authenticate", b"Bearer")])

    def check_request(self, scope: MutableMapping[str, Any]) -> None:
        """Raise `Refused` for a foreign host name, or a page of a foreign site."""
        self.check_host(scope)
        self.check_origin(scope)

    def check_host(self, scope: MutableMapping[str, Any]) -> None:
        """Raise `Refused` if the Host header is not an allowed name."""
        if self._hosts is None:
            return
        given = [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == b"host"]
        if len(given) != 1 or hostname_of(given[0]) not in self._hosts:
            raise Refused(
                421,
                f"this server does not answer to the name {', '.join(given)!r:.100}; allow it with hosts= of Access,"
                " origins= of Live, or --origin of stagecast watch",
            )

    def check_origin(self, scope: MutableMapping[str, Any]) -> None:
        """Raise `Refused` for a request from a page of a foreign site."""
        host, origin = _header(scope, b"host").lower(), _header(scope, b"origin").rstrip("/").lower()
        if origin and not self._is_own(origin, host, scope):
            raise Refused(
                403,
                f"pages of {origin:.100} may not use this server, {host:.100}; allow the site with origins=, or pass"
                " the Host header on in the proxy (nginx: proxy_set_header Host $http_host;)",
            )

    def _is_own(self, origin: str, host: str, scope: MutableMapping[str, Any]) -> bool:
        if origin in self._origins:
            return True
        # A page of a foreign site can set neither: browsers set the first, and need our permission for the second.
        if _header(scope, b"sec-fetch-site").strip().lower() == "same-origin":
            return True
        hosts = [host, *_header(scope, b"x-forwarded-host").lower().split(",")]
        place, scheme = _place(origin), origin.partition(":")[0]
        return place is not None and _portless(place, scheme) in {_portless(one.strip(), scheme) for one in hosts}

    async def ask(self, request: Request) -> None:
        """Run the host's check, if there is one. Raises `Refused`."""
        if self._check is None:
            return
        try:
            allowed = await self._ask(self._check, request)
        except Refused:
            raise
        except Exception as error:
            status = getattr(error, "status_code", None)
            if status in (401, 403):  # the framework's own refusal
                more = dict(getattr(error, "headers", None) or {}).items()
                headers = [(str(name).lower().encode(), str(value).encode()) for name, value in more]
                raise Refused(status, str(getattr(error, "detail", "") or error), headers=headers) from None
            logger.error(f"the check of Access failed, so the request was refused: {error!r}", exc_info=error)
            raise Refused(403, "the host's check failed; its log has the reason") from None
        if allowed is not True:
            if allowed is not False:
                kind = type(allowed).__name__
                logger.warning(f"the check of Access returned {kind}, so the request was refused; return True or False")
            raise Refused(403, "the host's check refuses this request")

    async def _ask(self, check: Check, request: Request) -> object:
        if inspect.iscoroutinefunction(check) or inspect.iscoroutinefunction(getattr(check, "__call__", None)):  # noqa: B004
            answer: object = check(request)
        else:
            # In a list: trio rejects a coroutine that a thread returns; it is awaited here.
            (answer,) = await anyio.to_thread.run_sync(lambda: [check(request)], limiter=self._threads)
        return await answer if inspect.isawaitable(answer) else answer


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def choose_token(given: str | bool | None, host: str) -> str | None:
    """Return the token that a page requires; None for a page without one.

    Args:
        given: The token; False for none. None: that of the environment variable ``STAGECAST_TOKEN``, or else a new
            random one, because other users of this machine can reach the page too.
        host: The page's address. No token is generated for other machines, whose users could not know it.

    Raises:
        SinkMisconfigured: Other machines can reach the page without a token; or the token is too short, or has
            characters that a header cannot carry.
    """
    if given is True:
        raise SinkMisconfigured("token=True is not a token; give a text, None for a new one, or False for none")
    token = given if isinstance(given, str) else None
    if given is None:
        token = os.environ.get(TOKEN_VARIABLE) or (secrets.token_urlsafe(24) if is_loopback(host) else None)
    check_host(host, token)
    return token


def check_token_text(token: str | None) -> None:
    """Raise `SinkMisconfigured`, without the token, for one that is too short or that a header cannot carry."""
    if token is not None and len(token) < 8:
        raise SinkMisconfigured("the token is too short; give at least 8 random characters")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise SinkMisconfigured("the token has characters that no header carries: give letters, digits and signs")


def check_host(host: str, token: str | None) -> None:
    """Raise `SinkMisconfigured` for an address that other machines can reach, without a valid token."""
    check_token_text(token)
    if token is None and not is_loopback(host):
        raise SinkMisconfigured(
            f"{host} can be reached from other machines; require a token (token=, or the environment variable"
            f" STAGECAST_TOKEN), or serve at 127.0.0.1"
        )


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:  # unbalanced brackets
        return None


def _portless(place: str, scheme: str) -> str:
    """Remove the default port of the scheme."""
    return place.removesuffix({"http": ":80", "https": ":443"}.get(scheme, ":"))


def hostname_of(host: str) -> str | None:
    """Return the name or address in a ``Host`` header, in lower case and without its port; None for any other text.

    Strict, because access depends on it: brackets hold an IPv6 address only, with nothing but a port behind them.
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.IPv6Address(host))
    found = _HOST.fullmatch(host)
    if found is None:
        return None
    inside, name = found["address"], found["name"]
    if inside is None:
        return name.lower()
    try:
        return str(ipaddress.IPv6Address(inside))
    except ValueError:
        return None


def _header(scope: MutableMapping[str, Any], name: bytes) -> str:
    value: bytes = next((value for key, value in scope["headers"] if key.lower() == name), b"")
    return value.decode("latin-1")
