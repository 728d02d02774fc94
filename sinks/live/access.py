"""Access to runs over the network: tokens, hosts, origins, and a check of the host application."""

from __future__ import annotations

import functools
import hmac
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Scope

from events.log import logger
from sinks.connections import hostname_of
from sinks.live.token import check_token_text

_MOST_CHECKS = 8
"""Maximum synchronous checks at a time, each on a thread."""


class Refused(HTTPException):
    """A refused request; a check of `Access` may raise it too.

    Attributes:
        code: The close code of a WebSocket.
    """

    def __init__(
        self, status_code: int, detail: str, *, code: int = 1008, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status_code, detail, headers)
        self.code = code


class Request(HTTPConnection):
    """A request, for the check of a host application. A command by WebSocket looks like a posted one.

    It has ``headers``, ``cookies``, ``query_params``, ``client`` and ``user`` as Starlette's and FastAPI's requests do,
    and ``scope`` with the entries of the host's middleware.

    Attributes:
        method: ``GET``, ``HEAD``, ``POST`` or any other; ``WEBSOCKET`` for a handshake.
        path: Below the mount point, decoded, without slashes at its ends: ``api/runs/line/events``.
    """

    def __init__(self, scope: Scope, method: str | None = None, path: str | None = None) -> None:
        super().__init__(scope)
        self.method: str = method or scope.get("method", "WEBSOCKET")
        self.path = path if path is not None else _path_of(scope)

    @property
    def headers(self) -> Headers:
        """In the order of the request; ``getlist`` returns all values of a name."""
        return Headers(raw=self.scope["headers"])  # `Headers(scope=...)` would replace the list in the scope

    @property
    def run_id(self) -> str | None:
        """The requested run; None for the page and the list of runs."""
        return self.path.split("/")[2] if self.path.startswith("api/runs/") else None

    @property
    def command(self) -> bool:
        """Whether the request is a command: pause, stop, take a checkpoint, change the notes about a run."""
        return self.run_id is not None and self.path.split("/")[3:] in (["commands"], ["notes"])

    def as_command(self) -> Request:
        """Return the request that posts a command to the same run."""
        return Request(self.scope, "POST", f"api/runs/{self.run_id}/commands")


def _path_of(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and (path + "/").startswith(root + "/"):  # as servers do since ASGI 3; older ones exclude the root path
        path = path[len(root) :]
    return path.strip("/")


Check = Callable[[Request], "bool | Awaitable[bool]"]


class Access:
    """Checks requests.

    Args:
        token: Required of every client; without it a client receives the empty page only. None: every client that
            reaches the server may see the runs.
        commands: Whether clients may also command the runs.
        origins: Further sites whose pages may use this server (``https://example.org``). Their names are also hosts.
        hosts: Allowed names in the Host header; None: any. Without a token, name them: a foreign page could otherwise
            let its own name resolve to this server (DNS rebinding).
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

    def __repr__(self) -> str:
        return f"Access(token={'...' if self._token else None}, commands={self.commands})"

    def allows(self, token: str | None) -> bool:
        """Whether this is the token, if one is required; in constant time."""
        shown = (token or "").encode("utf-8", "surrogatepass")
        return self._token is None or hmac.compare_digest(shown, self._token)

    @functools.cached_property
    def _threads(self) -> anyio.CapacityLimiter:
        """Our own, because a slow check must not occupy the host's threads; created in the server's event loop."""
        return anyio.CapacityLimiter(_MOST_CHECKS)

    def check_token(self, request: Request) -> None:
        """Raise `Refused` for a request without the token."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not self.allows(token.strip() if scheme.lower() == "bearer" else None):
            raise Refused(401, "this server wants its token", headers={"www-authenticate": "Bearer"})

    def check_host(self, request: Request) -> None:
        """Raise `Refused` if the Host header is not an allowed name."""
        if self._hosts is None:
            return
        given = request.headers.getlist("host")
        if len(given) != 1 or hostname_of(given[0]) not in self._hosts:
            raise Refused(
                421,
                f"this server does not answer to the name {', '.join(given)!r:.100}; allow it with hosts= of Access,"
                " origins= of Live, or --origin of stagecast watch",
            )

    def check_origin(self, request: Request) -> None:
        """Raise `Refused` for a request from a page of a foreign site."""
        host = request.headers.get("host", "").lower()
        origin = request.headers.get("origin", "").rstrip("/").lower()
        if origin and not self._is_own(origin, host, request.headers):
            raise Refused(
                403,
                f"pages of {origin:.100} may not use this server, {host:.100}; allow the site with origins=, or pass"
                " the Host header on in the proxy (nginx: proxy_set_header Host $http_host;)",
            )

    def _is_own(self, origin: str, host: str, headers: Headers) -> bool:
        if origin in self._origins:
            return True
        # A page of a foreign site can set neither: browsers set the first, and need our permission for the second.
        if headers.get("sec-fetch-site", "").strip().lower() == "same-origin":
            return True
        hosts = [host, *headers.get("x-forwarded-host", "").lower().split(",")]
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
                detail, headers = getattr(error, "detail", "") or error, getattr(error, "headers", None)
                raise Refused(status, str(detail), headers=headers) from None
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


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc or None
    except ValueError:  # unbalanced brackets
        return None


def _portless(place: str, scheme: str) -> str:
    """Remove the default port of the scheme."""
    return place.removesuffix({"http": ":80", "https": ":443"}.get(scheme, ":"))
