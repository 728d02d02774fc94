"""The address that `connect` is given: which server and run it leads to, and which token is sent there."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

import msgspec

from events.masking import masked_url
from events.run.folder import is_held
from events.safe_files import open_below
from events.text import is_encodable, plain_text
from trainer.errors import ConnectError

try:
    import httpx
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "connect needs the package httpx: pip install 'stagecast[live]'", name=missing.name
    ) from missing

TOKEN_VARIABLE = "STAGECAST_TOKEN"
URL_VARIABLE = "STAGECAST_URL"
"""Environment variable with the address of the server that the token of `TOKEN_VARIABLE` belongs to."""
_LINK_NAME = "live.json"
_LINK_BYTES = 2**14


class ServerOrigin(NamedTuple):
    """The server that an address leads to, as the HTTP client reads the address. A credential belongs to one."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> ServerOrigin:
        """Raises `ValueError` for an address that no request can be sent to."""
        try:
            address = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(str(error)) from None
        port = {"http": 80, "https": 443}.get(address.scheme, 0) if address.port is None else address.port
        if address.scheme not in ("http", "https") or not address.host or not 0 < port < 2**16:
            raise ValueError("not the address of a server")
        try:
            host = str(ipaddress.ip_address(address.host))  # an IPv6 address is written in several ways
        except ValueError:
            host = address.host
        return cls(address.scheme, host, port)

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine, by its name alone: no name is resolved but ``localhost``."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class PageAddress(NamedTuple):
    """The parts of the link to a page."""

    url: str
    """Of the page, with a slash at its end."""
    run_id: str
    """Empty if the link names no run."""
    token: str | None
    is_of_folder: bool = False
    """Whether the link was read from a folder, which may be a stranger's."""

    @classmethod
    def of(cls, given: object) -> PageAddress:
        """Split a link; read that of a run whose folder is given from the disk.

        Raises:
            ConnectError: The address is not valid, or the folder has no link of this user or no run under way.
        """
        url, is_of_folder = _link_of(given)
        try:
            if not isinstance(url, str):
                raise ValueError("not a text")
            origin, parts = ServerOrigin.of(url), urlsplit(url)
            # An @ behind the host may end a password with a slash, which belongs to another host than the one in front.
            if "@" not in parts.path + parts.query and is_encodable(url):
                base = urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") + "/", "", ""))
                named = parse_qs(parts.fragment)
                if ServerOrigin.of(base) == origin:
                    return cls(base, named.get("run", [""])[-1], named.get("token", [""])[-1] or None, is_of_folder)
        except ValueError:
            pass
        shown = plain_text(masked_url(url), 200) if isinstance(url, str) else url
        raise ConnectError(
            f"{shown!r:.240} is not the address of a page; give one like http://127.0.0.1:8765/#run=NAME"
        )


class _Link(msgspec.Struct):
    url: str
    token: str | None = None


def _link_of(given: object) -> tuple[object, bool]:
    """The link in the folder of a run with the sink `Live`, and True; what is not a folder unchanged, and False."""
    if not isinstance(given, str | os.PathLike) or given == "" or (isinstance(given, str) and "://" in given):
        return given, False
    folder = Path(given)
    try:
        if not folder.is_dir():
            return os.fspath(given), False
        file = open_below(folder, _LINK_NAME)
    except FileNotFoundError:
        raise ConnectError(
            f"{folder} has no {_LINK_NAME}, so no page of this run is served; add the sink Live, or connect to the"
            " link that stagecast watch prints"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL
        raise ConnectError(f"{folder} cannot be read ({error}); give the address of a page") from error
    try:
        if hasattr(os, "geteuid") and os.fstat(file).st_uid != os.geteuid():
            raise ConnectError(f"{folder / _LINK_NAME} belongs to another user; give the address of the page")
        link = msgspec.json.decode(os.read(file, _LINK_BYTES), type=_Link)
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ConnectError(f"{folder / _LINK_NAME} cannot be read ({error}); give the address of the page") from error
    finally:
        os.close(file)
    if not is_held(folder):  # an unpacked archive, say: any program may listen at that address now
        raise ConnectError(f"{folder} is not the folder of a run that is under way; give the address of a page")
    return (link.url if link.token is None else f"{link.url}#token={quote(link.token, safe='')}"), True


def token_of_environment(url: str, *, is_of_folder: bool) -> tuple[str | None, str]:
    """The token for a server from the environment; if it belongs to another, None and the end of an error about that.

    Args:
        is_of_folder: Whether the address was read from a folder. Then `URL_VARIABLE` must name the server, because any
            program may listen on a port of this machine.

    Raises:
        ConnectError: `URL_VARIABLE` is not an address.
    """
    token, named, origin = os.environ.get(TOKEN_VARIABLE), os.environ.get(URL_VARIABLE), ServerOrigin.of(url)
    if not token or (not named and origin.is_loopback and not is_of_folder):
        return token or None, ""
    if not named and is_of_folder:
        where = "an address of a run folder"
        return None, f"; {TOKEN_VARIABLE} is sent to {where} only if {URL_VARIABLE} names that server"
    if not named:
        return None, f"; {TOKEN_VARIABLE} is sent to this machine alone, unless {URL_VARIABLE} names the server"
    try:
        owner = ServerOrigin.of(named)
    except ValueError:
        shown = plain_text(masked_url(named), 200)
        raise ConnectError(
            f"{URL_VARIABLE}={shown!r} is not an address; give one like http://127.0.0.1:8765/"
        ) from None
    return (token, "") if owner == origin else (None, f"; {TOKEN_VARIABLE} belongs to {owner}, as {URL_VARIABLE} says")
