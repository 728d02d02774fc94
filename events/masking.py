"""Secrets of URLs are masked in messages for people; those of hyperparameters and command lines in records, too.

All functions may be called from any thread.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from events.bounds import MAX_LINE_CHARS

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
_WORD_BREAK = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")
_MASK = "..."
_STRONG = re.compile(r"password|passwd|passphrase|secret|credential|(?:^|_)(?:pwd|auth|authorization)$")
_SECRET_NAME = re.compile(
    rf"{_STRONG.pattern}|(?:^|_)(?:jwt|bearer|cookie|sig)$|token$"
    r"|(?:^|api|access|private|account|signing|encryption|service|storage|subscription|license|deploy|ssh|wandb)_?key$"
)
_TEXT_TOKEN = re.compile(
    r"(?:^|_)(?:pad|bos|eos|unk|mask|sep|cls|start|end|stop|special|image|audio|prompt|placeholder)_?token$"
)
"""Hyperparameters of language models, such as ``pad_token="<pad>"``."""
_SECRET_NUMBER = re.compile(r"(?:password|passwd|passphrase|pwd|secret|[a-z]_?key)$")
"""The end of a secret name whose numbers are secrets, too: not ``password_length`` or ``max_token``."""
_NUMBER = re.compile(r"[-+]?[\d._]+(?:[eE][-+]?\d+)?")
_KNOWN = re.compile(r"\b(?:hf_|gh[opsur]_|github_pat_|glpat-|xox[abprs]-|sk-|AKIA)[A-Za-z0-9_-]{16,}")
"""Tokens that their beginning gives away."""
_OPTION = re.compile(r"([-+~]*)([\w.-]{1,100})=")
_PAIR = re.compile(r"""(?<![\w.-])([\w.-]{1,100})(["']?\s{0,9}[:=]\s{0,9}["']?)([^\s"',;&{}\[\]](?:[^"',;&}\]]*))""")
"""A name and its value within an argument: of JSON, a header, or several settings."""
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


def is_secret_name(name: str) -> bool:
    """Whether a text under this name is a secret, be it an option, a hyperparameter or a header: ``hf_token``."""
    words = _WORD_BREAK.sub("_", name).strip("_").lower()
    return _SECRET_NAME.search(words) is not None and _TEXT_TOKEN.search(words) is None


def masked_values(value: Any, name: str = "") -> Any:
    """Copy plain values without secrets: texts under a secret name, and those of URLs in other texts.

    Args:
        value: None, bool, int, float, str, and lists and dicts of them.
        name: The name of the value.
    """
    if isinstance(value, dict):
        within = name if name and _STRONG.search(_WORD_BREAK.sub("_", name).lower()) else ""
        return {key: masked_values(one, str(key) if is_secret_name(str(key)) else within) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(one, name) for one in value]
    if isinstance(value, str):
        return _MASK if value and is_secret_name(name) else _KNOWN.sub(_MASK, masked(value))
    if type(value) is int and is_secret_name(name) and _SECRET_NUMBER.search(name.lower()):
        return _MASK
    return value


def masked_command(arguments: Sequence[str]) -> str:
    """Return a command line, quoted for a shell, without secrets.

    The values of options with secret names are masked (``--token=X``, ``--token X``, ``tracker.api_key=X``), and pairs
    within an argument (``{"password": "X"}``, ``Authorization: Bearer X``).
    """
    shown: list[str] = []
    is_value = False  # of a secret option before it
    for one in arguments:
        option = _OPTION.match(one)
        if is_value and not one.startswith("--"):
            shown.append(_MASK)
            is_value = False
            continue
        is_value = option is None and one.startswith("-") and is_secret_name(one)
        if option is not None and _is_secret(option[2], one[option.end() :]):
            shown.append(f"{option[0]}{_MASK}")
        else:
            shown.append(_KNOWN.sub(_MASK, masked(_PAIR.sub(_pair, one))))
    return shlex.join(shown)


def own_command_line() -> str:
    """Return the command line of this process without secrets, at most `MAX_LINE_CHARS` characters of it."""
    shown = masked_command(sys.orig_argv).encode("utf-8", "backslashreplace").decode()
    return shown if len(shown) <= MAX_LINE_CHARS else f"{shown[: MAX_LINE_CHARS - 3]}..."


def _pair(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}{_MASK}" if _is_secret(found[1], found[3]) else found[0]


def _is_secret(name: str, text: str) -> bool:
    is_number = _NUMBER.fullmatch(text) is not None
    return is_secret_name(name) and (not is_number or _SECRET_NUMBER.search(name.lower()) is not None)


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
