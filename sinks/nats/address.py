"""Addresses of NATS servers, and the subjects of runs. Pure functions.

Events are published to ``PREFIX.RUN.TYPE``, for example ``stagecast.my-run.TrainStepEnded``; a stream keeps
``PREFIX.*.*``. Commands are requests to ``PREFIX-commands.RUN``, which no stream may keep: its acknowledgement would be
taken for the answer.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from events.masking import masked_url
from events.text import is_encodable, percent_encoded, plain_text

SCHEMES = ("nats://", "tls://")
_PORT = 4222
_PREFIX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_OPTIONS = frozenset({"creds", "ca", "prefix"})


class NatsAddress(NamedTuple):
    """The parts of the address of a NATS server."""

    server: str
    """``nats://HOST:PORT`` or ``tls://HOST:PORT``, without secrets."""
    user: str = ""
    password: str = ""
    token: str = ""
    run_id: str = ""
    """The run in the path; empty if the address names none."""
    creds: str = ""
    """A credentials file (``.creds``); empty for none."""
    ca: str = ""
    """A file with the certificate of your own authority; empty for those that the system trusts."""
    prefix: str = "stagecast"
    """The first part of all subjects."""

    @classmethod
    def of(cls, url: str) -> NatsAddress:
        """Split ``nats://[TOKEN@|USER:PASSWORD@]HOST[:PORT][/RUN][?creds=FILE&ca=FILE&prefix=NAME]``.

        Raises:
            ValueError: The address is not valid; the message is one for people, without secrets.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or _PORT
            options = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            # An @ behind the host may end a password with a slash, which belongs to another host than the one in front.
            if f"{parts.scheme}://" in SCHEMES and host and "@" not in parts.path and is_encodable(url):
                host = f"[{host}]" if ":" in host else host
                user, password = unquote(parts.username or ""), unquote(parts.password or "")
                chosen = {name: values[-1] for name, values in options.items()}
                _check_options(chosen)
                return cls(
                    f"{parts.scheme}://{host}:{port}",
                    user if password else "",
                    password,
                    "" if password else user,
                    unquote(parts.path.removeprefix("/")),
                    **{name: os.path.expanduser(value) for name, value in chosen.items()},
                )
        except _Invalid as error:
            raise ValueError(str(error)) from None
        except (ValueError, AttributeError, TypeError):
            pass
        shown = plain_text(masked_url(url), 200) if isinstance(url, str) else f"{url!r:.80}"
        raise ValueError(f"{shown!r} is not the address of a NATS server; give one like nats://HOST:4222")

    def events(self, run_id: str, kind: str = "*") -> str:
        """The subject of a run's events of one type, or of all."""
        return f"{self.prefix}.{percent_encoded(run_id)}.{kind if kind == '*' else percent_encoded(kind)}"

    @property
    def all_events(self) -> str:
        """The subject of all events of all runs."""
        return f"{self.prefix}.*.*"

    def commands(self, run_id: str) -> str:
        """The subject of requests to a run."""
        return f"{self.prefix}-commands.{percent_encoded(run_id)}"

    def run_of(self, subject: str) -> str | None:
        """The run of an event's subject; None if it is not one."""
        first, _, rest = subject.rpartition(".")[0].rpartition(".")
        return unquote(rest) if first == self.prefix and rest else None


class _Invalid(Exception):
    """One option of an address is not valid."""


def _check_options(options: dict[str, str]) -> None:
    if unknown := sorted(options.keys() - _OPTIONS):
        raise _Invalid(
            f"{plain_text(unknown[0], 80)!r} is not an option of a NATS address; known are creds, ca, prefix"
        )
    if not _PREFIX.fullmatch(prefix := options.get("prefix", "stagecast")):
        raise _Invalid(
            f"prefix={plain_text(prefix, 80)!r} is not a subject; give letters, digits, - and _, joined by ."
        )
    for name in ("creds", "ca"):
        if name in options and not os.path.isfile(os.path.expanduser(options[name])):
            raise _Invalid(f"{name}={plain_text(options[name], 200)!r} is not a file; give the path of a readable one")


def is_nats_address(given: object) -> bool:
    """Whether ``given`` is meant to be the address of a NATS server."""
    return isinstance(given, str) and given.lower().startswith(SCHEMES)
