"""Secrets of URLs are masked in messages for people.

All functions are pure and may be called from any thread.
"""

from __future__ import annotations

import re
from urllib.parse import unquote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,30}:[/\\]+\S+")
_SCHEME = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?[/\\]+")
_PARAMETER = re.compile(r"(^|[?&#;/\\])([^=?&#;/\\]*)=[^&]*")
_SECRET = ("token", "key", "secret", "password", "passwd", "pwd", "sig", "credential", "auth", "code", "jwt")
_PORT = re.compile(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::\d*)?")


def masked_url(url: str) -> str:
    """Return a URL without user, password and secret parameters, however malformed it is.

    Everything before the last ``@`` counts as user and password: a password may contain slashes that nobody escaped.
    """
    return _without_parameters(_without_user(url))


def masked(text: str) -> str:
    """Return a text whose URLs have no user, no password and no secret parameters.

    An ``@`` in the path of a URL remains where the host before it is complete: ``s3://bucket/a@b``.
    """
    if ":/" not in text and ":\\" not in text:
        return text
    return _URL.sub(lambda found: _masked_in_text(found[0]), text)


def _masked_in_text(url: str) -> str:
    scheme = _SCHEME.match(url)
    rest = url[scheme.end() :] if scheme is not None else url
    authority = re.split(r"[/\\?#]", rest, maxsplit=1)[0]
    if "@" in authority or not _PORT.fullmatch(authority):  # a port that is not a number began a password
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
