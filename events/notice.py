"""Lines for the person who started a run: on stderr, without any configuration, also out of a sink host.

They are not warnings: nothing is published, logged or kept, so a line may hold a secret that the person needs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

is_kept = False
"""Whether stderr of this process is a file of the run's folder, where no secret belongs."""
forward: Callable[[str, str], None] | None = None
"""Takes the lines, where another process has the person's stderr."""


def notify(text: str, without_secrets: str) -> None:
    """Write a line to stderr; without secrets where that is kept. Any thread. Never raises."""
    if forward is not None:
        forward(text, without_secrets)
        return
    with contextlib.suppress(Exception):  # a stranger's stream may be closed, None, or without flush
        sys.stderr.write(f"stagecast: {without_secrets if is_kept else text}\n")
        sys.stderr.flush()
