"""The console's lines of results: one per epoch, per test, and per validation in the middle of an epoch."""

from __future__ import annotations

import math

from events.messages import MetricsLogged, TestEpochEnded, TrainEpochEnded, TrainStepEnded, ValEpochEnded
from events.metrics import metric_name
from events.run.state import RunState
from sinks.console.text import Field, Line, Span
from sinks.format import format_duration, format_number, plain_text

_MAX_METRICS = 16
"""Maximum metrics per line."""
_MAX_RESULTS = 2_000
"""Maximum results that wait for a line; `_MAX_METRICS` of them are in it."""


class ResultLines:
    """Holds back the results of validations and tests until the line that they belong to."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._validated: dict[str, float] = {}
        self._validated_at = 0
        self._validated_s = 0.0
        self._tested: dict[str, float] = {}
        self._shown_epoch: int | None = None

    def start(self) -> None:
        """Forget the attempt before."""
        self._shown_epoch = None
        self._validated.clear()

    def train_step_ended(self, e: TrainStepEnded) -> list[Line]:
        """Training continues: results from the middle of an epoch get a line of their own."""
        return self._mid_epoch(e.time) if self._validated and e.global_step > self._validated_at else []

    def val_epoch_ended(self, e: ValEpochEnded) -> list[Line]:
        """Hold back the loss."""
        self._validated_at = e.global_step
        self._validated_s += e.duration_s
        if e.loss is not None:
            _keep(self._validated, {metric_name("val_loss", e.key): e.loss})
        return []

    def metrics_logged(self, e: MetricsLogged) -> list[Line]:
        """Hold back the results of an evaluation; a hook that logged them after the epoch's line gets one more."""
        if e.key is None:
            return []
        named = {metric_name(name, e.key): value for name, value in e.metrics.items()}
        if e.stage == "test":
            _keep(self._tested, named)
        elif self._shown_epoch is not None and e.epoch <= self._shown_epoch:
            return [Line(e.time, "epoch", [(Span(self._epoch_name(e.epoch), "head"),), *_metrics(named)])]
        else:
            _keep(self._validated, named)
            self._validated_at = e.global_step
        return []

    def train_epoch_ended(self, e: TrainEpochEnded) -> list[Line]:
        """The line of an epoch."""
        loss = {} if e.loss is None else {"train_loss": e.loss}
        line = self._line(e.time, self._epoch_name(e.epoch), loss, self._validated, e.duration_s)
        self._validated_s, self._shown_epoch = 0.0, e.epoch
        return [line]

    def test_epoch_ended(self, e: TestEpochEnded) -> list[Line]:
        """The line of a test."""
        loss = {} if e.loss is None else {"loss": e.loss}
        return [self._line(e.time, f"test {plain_text(e.key, 60)}", loss, self._tested, e.duration_s)]

    def finish(self, time: float) -> list[Line]:
        """Return the lines of results that no other line has shown."""
        lines = self._mid_epoch(time) if self._validated else []
        return [*lines, self._line(time, "test", {}, self._tested, 0.0)] if self._tested else lines

    def _mid_epoch(self, time: float) -> list[Line]:
        line = self._line(time, f"step {self._validated_at:,}", {}, self._validated, self._validated_s)
        self._validated_s = 0.0
        return [line]

    def _line(self, time: float, head: str, loss: dict[str, float], held: dict[str, float], took_s: float) -> Line:
        fields = [(Span(head, "head"),), *_metrics(loss), *_metrics(held)]
        if took_s > 0:
            fields.append((Span(format_duration(took_s), "dim"),))
        held.clear()
        return Line(time, "epoch", fields)

    def _epoch_name(self, epoch: int) -> str:
        of = self._state.run.epochs
        return f"epoch {epoch + 1}" if of is None else f"epoch {epoch + 1:>{len(str(of))}}/{of}"


def _keep(into: dict[str, float], named: dict[str, float]) -> None:
    into.update(named)
    while len(into) > _MAX_RESULTS:
        into.popitem()


def _metrics(values: dict[str, float]) -> list[Field]:
    """Losses first, in whatever order they were logged; then in the order of logging."""
    shown = sorted(values.items(), key=lambda item: not item[0].startswith("val_loss"))[:_MAX_METRICS]
    fields: list[Field] = [
        (
            Span(f"{plain_text(name, 60)} ", "dim"),
            Span(f"{format_number(value):>6}", "" if math.isfinite(value) else "bad"),
        )
        for name, value in shown
    ]
    if len(values) > _MAX_METRICS:
        fields.append((Span(f"and {len(values) - _MAX_METRICS:,} more", "dim"),))
    return fields
