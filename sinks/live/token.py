"""The token of a page, and the addresses at which a page needs one."""

from __future__ import annotations

import ipaddress
import os
import secrets

from events.errors import SinkMisconfigured

TOKEN_VARIABLE = "STAGECAST_TOKEN"
"""Environment variable with the token, for servers and clients."""


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
