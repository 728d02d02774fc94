"""Addresses of trackers' servers."""

from __future__ import annotations

import re
from urllib.parse import urlsplit


def is_http_address(url: str) -> bool:
    """Whether a text is an HTTP address with a host and, if any, a valid port."""
    try:
        parts = urlsplit(url)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        return is_server and not re.search(r"\s", url)
    except ValueError:
        return False  # the port is not a number, or the host not an IPv6 address
