"""Where alerts go: the desktop, a webhook, or a command. Each call waits; it runs on the sink's own thread."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from sinks.alerts.rules import AlertMessage

_WEBHOOK_S = 15.0
_COMMAND_S = 60.0


class AlertTarget(Protocol):
    """Sends one message. Waits until it is delivered; raises if it is not."""

    def send(self, message: AlertMessage) -> None:
        """Deliver the message."""
        ...


def target_of(to: str) -> AlertTarget:
    """Return the target of an address.

    Raises:
        ValueError: It is not one, or this machine lacks what it takes; the text says what to do.
    """
    if to == "desktop":
        return DesktopTarget()
    if to.lower().startswith(("http://", "https://")):
        if not urlsplit(to).hostname:
            raise ValueError("the address of the webhook has no host; give https://HOST/PATH")
        return WebhookTarget(to)
    try:
        words = shlex.split(to)
    except ValueError as error:
        raise ValueError(f"to={to!r:.80} is not a command: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise ValueError(
            f"to={to!r:.80} is not 'desktop', not an address (https://...), and not a program that is found; give one"
            f" of them"
        )
    return CommandTarget(words)


class DesktopTarget:
    """Shows a notification on the desktop of the user who runs the process.

    Raises:
        ValueError: This machine has no program for it.
    """

    def __init__(self) -> None:
        self._program = "osascript" if sys.platform == "darwin" else "notify-send"
        if shutil.which(self._program) is None:
            raise ValueError(
                f"to='desktop' needs the program {self._program}; install it, or give a webhook or command"
            )

    def send(self, message: AlertMessage) -> None:
        """Show it. Waits for the program."""
        title = f"stagecast: {message.kind.replace('_', ' ')}"
        if self._program == "notify-send":
            urgency = "normal" if message.kind == "finished" else "critical"
            words = ["--app-name=stagecast", f"--urgency={urgency}", "--", title, message.text]
        else:
            # The text is an argument of the script, not a part of it.
            script = "on run {t, m}\ndisplay notification m with title t\nend run"
            words = ["-e", script, title, message.text]
        _run([self._program, *words], dict(os.environ))


class WebhookTarget:
    """Posts a message as JSON. Slack and Mattermost show its ``text``, Discord its ``content``."""

    def __init__(self, url: str) -> None:
        self._url = url

    def send(self, message: AlertMessage) -> None:
        """Post it. Waits for the answer, at most 15 seconds."""
        body = msgspec.json.encode({**msgspec.structs.asdict(message), "content": message.text})
        request = urllib.request.Request(
            self._url, body, {"Content-Type": "application/json", "User-Agent": "stagecast"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=_WEBHOOK_S) as answer:  # http and https only
                answer.read(65_536)
        except urllib.error.HTTPError as error:
            with error:  # or its connection stays open
                said = error.read(300).decode(errors="replace")
            raise RuntimeError(f"the webhook answered {error.code} {error.reason}: {said}") from None


class CommandTarget:
    """Runs a program with the text as its last argument, and the other fields in ``STAGECAST_ALERT_...``."""

    def __init__(self, words: list[str]) -> None:
        self._words = words

    def send(self, message: AlertMessage) -> None:
        """Run it. Waits for its end, at most a minute."""
        fields = {f"STAGECAST_ALERT_{name.upper()}": str(value) for name, value in _fields(message).items()}
        _run([*self._words, message.text], {**os.environ, **fields})


def _fields(message: AlertMessage) -> dict[str, object]:
    return {name: "" if value is None else value for name, value in msgspec.structs.asdict(message).items()}


def _run(words: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_S, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise RuntimeError(f"{words[0]} ended with code {done.returncode}: {said}")
