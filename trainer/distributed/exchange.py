"""When a rank comes to the exchange of gradients, in which all ranks wait for the slowest."""

from __future__ import annotations

from time import perf_counter_ns as clock

from trainer.loop.ledger import Ledger


class ExchangeClock:
    """How long a step takes from one exchange of gradients to the next, and how long the loop works until it comes.

    On the loop's thread.

    Attributes:
        total: Steps so far, the nanoseconds that they took, and those of the loop's work until the exchange. Any thread
            may read it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.total = 0, 0, 0
        self._ledger = ledger
        self._before: tuple[int, int] | None = None  # time and work at the end of the last exchange
        self._work_ns = 0

    def begin(self) -> None:
        """The loop has come to the exchange."""
        if self._before is not None:
            self._work_ns = self._ledger.working_ns() - self._before[1]

    def end(self) -> None:
        """The exchange has ended."""
        now, before, total = clock(), self._before, self.total
        if before is not None:
            self.total = total[0] + 1, total[1] + now - before[0], total[2] + self._work_ns
        self._before = now, self._ledger.working_ns()

    def forget(self) -> None:
        """Something else than a step follows, such as a validation."""
        self._before = None
