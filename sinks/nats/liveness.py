"""Whether a run whose events come through NATS is still under way. No I/O."""

from __future__ import annotations

import time

_QUIET_S = 5.0
_UNSERVED_S = 30.0
"""Seconds without an event and an answer of a sink, which may be reconnecting, after which a run is lost."""
_SILENT_S = 120.0
"""Seconds without an event after which a run is lost if its sink cannot be asked; a run reports more often."""


class Liveness:
    """The time since the newest event of a run.

    Args:
        age_s: Seconds since the newest event that is known.
    """

    def __init__(self, age_s: float = 0.0) -> None:
        self._heard_at = time.monotonic() - age_s

    def heard(self, age_s: float = 0.0) -> None:
        """An event has arrived, which is ``age_s`` old."""
        self._heard_at = time.monotonic() - max(0.0, age_s)

    @property
    def is_quiet(self) -> bool:
        """Whether there was no event for so long that the sink is to be asked."""
        return time.monotonic() - self._heard_at > _QUIET_S

    def is_lost(self, served: bool | None) -> bool:
        """Whether the run's process must have died.

        Args:
            served: Whether a sink has answered for the run; None if it could not be asked.
        """
        if served:
            self.heard()
            return False
        return time.monotonic() - self._heard_at > (_SILENT_S if served is None else _UNSERVED_S)
