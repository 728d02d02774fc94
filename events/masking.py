"""Secrets of URLs are masked in messages for people.

All functions are pure and may be called from any thread.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,30}:[/\\]+(?:[\r\n]+[ \t]*)?\S+")
_SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\][/\\\s]*")
_PARAMETER = re.compile(r"(^|[?&#;/\\])([^=?&#;/\\]*?)(?:=|%3[Dd])[^&]*")
_SECRET = ("token", "key", "secret", "password", "passwd", "pwd", "sig", "credential", "auth", "code", "jwt")
_HOST = re.compile(r"(?:\[[^\]]*\]|localhost|\d+(?:\.\d+){3}|)(?::\d*)?|[^:\[\]]*")
"""What is before a path and cannot be a user with the beginning of a password."""
_PORT = re.compile(r"[^:\[\]]*:\d*")
_BROKEN = re.compile(r"[\r\n]+[ \t]*\S+")
_NEXT_WORD = re.compile(r"\s+\S+")
_WORD = re.compile(r"\S*")
_FAR = 200
"""Maximum characters of a text behind a URL in which the rest of its password is looked for."""


def masked_url(url: str) -> str:
    """Return a URL without user, password and secret parameters, however malformed it is.

    Everything before the last ``@`` counts as user and password: a password may contain slashes that nobody escaped.
    """
    return _without_parameters(_without_user(url))


def masked(text: str) -> str:
    """Return a text whose URLs have no user, no password and no secret parameters.

    An ``@`` in the path of a URL remains where the host before it has no port, or is an address or ``localhost``:
    ``s3://bucket/a@b``. Elsewhere the port may be the beginning of a password with a slash, and a password may continue
    behind a space or a line break.
    """
    if ":/" not in text and ":\\" not in text:
        return text
    parts: list[str] = []
    end = 0
    while (found := _URL.search(text, end)) is not None:
        parts.append(text[end : found.start()])
        end = _end_of(text, found)
        parts.append(_masked_in_text(text[found.start() : end]))
    return "".join([*parts, text[end:]])


def _end_of(text: str, found: re.Match[str]) -> int:
    """Where a URL ends whose password or last parameter may hold a space or a line break."""
    end, authority = found.end(), _authority_of(found[0])
    if "@" not in found[0]:
        if found[0].endswith(("\\n", "\\r")):  # a line break that was escaped
            more = _NEXT_WORD.match(text, end)
        elif _HOST.fullmatch(authority):
            more = _BROKEN.match(text, end) if found[0].endswith(authority) else None
        elif _PORT.fullmatch(authority):
            more = _NEXT_WORD.match(text, end)
        else:  # the beginning of a password
            at = text.rfind("@", end, end + _FAR)
            more = _WORD.match(text, at) if at >= 0 else None
        if more is not None and "@" in more[0]:
            return more.end()
    if _without_parameters(found[0]).endswith("=...") and (more := _BROKEN.match(text, end)):
        return more.end()
    return end


def _authority_of(url: str) -> str:
    scheme = _SCHEME.match(url)
    return re.split(r"[/\\?#]", url[scheme.end() :] if scheme is not None else url, maxsplit=1)[0]


def _masked_in_text(url: str) -> str:
    authority = _authority_of(url)
    # A backslash is not in a URL, but in an escaped line break.
    if "@" in authority or not _HOST.fullmatch(authority) or "\\" in url:
        url = _without_user(url)
    return _without_parameters(url)


def _without_user(url: str) -> str:
    scheme = _SCHEME.match(url)
    start = scheme.end() if scheme is not None else 0
    _, found, host = url[start:].rpartition("@")
    return f"{url[:start]}...@{host}" if found else url


def _without_parameters(url: str) -> str:
    return _PARAMETER.sub(_parameter, url)


def _parameter(found: re.Match[str]) -> str:
    name = unquote(found[2]).lower()
    return f"{found[1]}{found[2]}=..." if any(word in name for word in _SECRET) else found[0]
