"""Escape untrusted text for terminals, and convert it to names for journals and loggers."""

from __future__ import annotations

import re
import zlib
from urllib.parse import quote

MOST_NAME = 250
"""Maximum characters per name of a metric, a dataloader or a run."""

# Control characters, marks that change the direction of text, separators of lines, lone surrogates.
_NOT_IN_NAMES = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain_text(text: str, limit: int = 500) -> str:
    """Convert any text to one printable line: unprintable characters are escaped, a long text is cut.

    Control characters, line breaks, text direction marks and lone surrogates become ``\\x1b``, ``\\n`` and the like,
    so that a metric's name or an exception's text can neither move the cursor nor break a line.
    """
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def one_line(text: str, limit: int = 10_000) -> str:
    """Convert any text to one printable line; each line break, with the spaces around it, becomes one space."""
    return plain_text(text if text.isprintable() else " ".join(text.split()), limit)


def plain_lines(text: str, limit: int = 10_000) -> str:
    """Escape as `plain_text` does, but keep line breaks and tabs.

    Args:
        limit: Maximum characters per line.
    """
    if text.isprintable() and len(text) <= limit:
        return text
    return "\n".join("\t".join(plain_text(part, limit) for part in line.split("\t")) for line in text.split("\n"))


def name_problem(text: str) -> str | None:
    """Describe why a text is not a valid name; None if it is."""
    if not text:
        return "is empty"
    if len(text) > MOST_NAME:
        return f"has {len(text):,} characters, more than {MOST_NAME}"
    if _NOT_IN_NAMES.search(text):
        return "holds characters that cannot be printed"
    return None


def as_name(text: str) -> str:
    """Convert a text to a valid name: unprintable characters are escaped, a long text ends in its hash.

    A valid name is returned unchanged. Different texts become different names, except for hash collisions.
    """
    if name_problem(text) is None:
        return text
    name = _NOT_IN_NAMES.sub(lambda found: _escaped(found[0]), text)
    if len(name) > MOST_NAME:
        name = f"{name[: MOST_NAME - 12]}...{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}"
    return name


def percent_encoded(name: str) -> str:
    """Encode any name without slashes and dots, as one part of a path or of a subject; `unquote` decodes it."""
    return quote(name, safe="", errors="backslashreplace").replace(".", "%2E")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def is_encodable(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: it has no lone surrogates, which occur in file names."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
