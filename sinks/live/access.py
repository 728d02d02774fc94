"""Who may see runs over the network, and who may command them."""

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
"""Environment variable with the token of pages that are served and of servers that are connected to."""
Headers = list[tuple[bytes, bytes]]
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._~-]+))(?::[0-9]{0,5})?")
_MOST_CHECKS = 8
"""Maximum synchronous checks at a time, each on a thread."""


class Refused(Exception):
    """A request that is refused; a check of `Access` may raise it, too.

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
    """A request, as a check of the host's own sees it. A command by WebSocket looks like one that is posted."""

    method: str
    """``GET``, ``HEAD``, ``POST`` or any other; ``WEBSOCKET`` for the beginning of one."""
    path: str
    """Below where the application is mounted, decoded, without slashes at its ends: ``api/runs/line/events``."""
    scope: Mapping[str, Any] = field(repr=False)
    """The ASGI scope, with what the host's middleware has put there: ``request.scope["user"]``."""

    @property
    def run_id(self) -> str | None:
        """The run that it is about; None for the page and the list of runs."""
        return self.path.split("/")[2] if self.path.startswith("api/runs/") else None

    @property
    def command(self) -> bool:
        """Whether it would pause or stop the run, or take a checkpoint."""
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
        """By name; empty if the header cannot be read."""
        try:
            return {name: one.value for name, one in SimpleCookie(self.headers.get("cookie", "")).items()}
        except CookieError:
            return {}

    @cached_property
    def query(self) -> Mapping[str, str]:
        """Of the address; the last value of each name."""
        return dict(parse_qsl(self.scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True))

    @property
    def client(self) -> str | None:
        """Address of the client, or of the proxy before the server; None if the server does not know it."""
        client = self.scope.get("client")
        return str(client[0]) if client else None


Check = Callable[[Request], "bool | Awaitable[bool]"]


class Access:
    """Checks requests.

    Args:
        token: Who does not show it sees nothing but the empty page. None: whoever reaches the server may look.
        commands: Whether those who may see runs may also command them.
        origins: Sites whose pages may talk to this server, beside its own (``https://example.org``). Their names are
            among the hosts.
        hosts: Names under which the server is asked for; None: any. Where there is no token, name them: a page of a
            stranger could else make a name of his own lead here (DNS rebinding).
        check: The host's own, for pages, runs, streams, WebSockets and commands alike, beside the token: gets a
            `Request` and returns whether it is allowed. It may be ``async``; one that is not runs on a thread, at most
            8 at a time. Any value but True refuses with 403. So does an exception, which is logged; `Refused`, and
            exceptions with a ``status_code`` of 401 or 403, such as FastAPI's and Starlette's, refuse with theirs.
            It is asked when a connection is opened, and for each command; a stream stays open until it ends.

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
        check: Check | None = None,
    ) -> None:
        check_token_text(token)
        self._token = token.encode() if token is not None else None
        self.commands = commands
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        named = {name for origin in self._origins if (name := hostname_of(_place(origin) or "")) is not None}
        # A name that is not a host name stays as it is: no request ever has it.
        self._hosts = None if hosts is None else {hostname_of(host) or host.lower() for host in hosts} | named
        self._check = check
        self._threads = anyio.CapacityLimiter(_MOST_CHECKS)  # our own: a slow check must not take those of the host

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
        self.check_host(scope)
        self.check_origin(scope)

    def check_host(self, scope: MutableMapping[str, Any]) -> None:
        """See that this server is asked for under a name that it has. Raises `Refused`."""
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
        """See that no page of another site asks. Raises `Refused`."""
        host, origin = _header(scope, b"host").lower(), _header(scope, b"origin").rstrip("/").lower()
        if origin and not self._is_own(origin, host, scope):
            raise Refused(
                403,
                f"a page of {origin:.100} asks, and this server is {host:.100}; behind a proxy pass the Host header on"
                " (nginx: proxy_set_header Host $http_host;), or allow the site with origins=",
            )

    def _is_own(self, origin: str, host: str, scope: MutableMapping[str, Any]) -> bool:
        if origin in self._origins:
            return True
        # A page of another site can set neither: browsers keep the first to themselves, and ask before the second.
        if _header(scope, b"sec-fetch-site").strip().lower() == "same-origin":
            return True
        hosts = [host, *_header(scope, b"x-forwarded-host").lower().split(",")]
        place, scheme = _place(origin), origin.partition(":")[0]
        return place is not None and _portless(place, scheme) in {_portless(one.strip(), scheme) for one in hosts}

    async def ask(self, request: Request) -> None:
        """Ask the host's check, if there is one. Raises `Refused`."""
        if self._check is None:
            return
        try:
            allowed = await self._ask(self._check, request)
        except Refused:
            raise
        except Exception as error:
            status = getattr(error, "status_code", None)
            if status in (401, 403):  # a framework's own way to refuse
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
            # In a list: trio refuses a coroutine that comes from a thread, and it is awaited here.
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
    """Return the token that a page demands; None if it demands none.

    Args:
        given: The token; False for none. None: that of the environment variable ``STAGECAST_TOKEN``, or else a new
            random one, because other users of this machine can reach the page, too.
        host: Where the page is served. Beyond this machine no token is generated: people there have to know it.

    Raises:
        SinkMisconfigured: Others can reach the page, and there is no token; or the token is too short, or has
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


def _portless(place: str, scheme: str) -> str:
    """Without the port that the scheme has anyway."""
    return place.removesuffix({"http": ":80", "https": ":443"}.get(scheme, ":"))


def hostname_of(host: str) -> str | None:
    """Return the name or address in a ``Host`` header, in lower case and without its port; None if it has neither.

    Strict, because the name decides who is answered: in brackets only an IPv6 address, and nothing but a port behind.
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
