"""A sink that alerts a person."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from events.errors import SinkMisconfigured
from events.log import logger
from events.messages import Event
from events.sink import Delivery, RunInfo
from events.strict import Strict
from sinks.alerts.rules import EVENTS, AlertLimits, AlertMessage, Kind, Rules
from sinks.alerts.targets import AlertTarget, target_of

_MOST_PENDING = 100
_RETRY_S = 30.0


class Alert(Strict, frozen=True):
    """Tells a person when a run needs them: on the desktop, by a webhook, or by a command::

        Trainer(module, arguments, alerts=[Alert("https://hooks.slack.com/services/...")]).train()
        Trainer(module, arguments, alerts=[Alert("desktop"), Alert("./text-me.sh", when=["failed", "nan"])]).train()
        $ stagecast watch runs --alert desktop        # of all runs in a folder, also of those that are killed

    Each condition gives one message until it is over. What they are:

    - ``failed``: the run failed, with phase and reason; or its process was killed, which the process itself cannot
      tell: that is seen by ``stagecast watch``, or with ``sinks_in="process"``.
    - ``nan``: a loss or gradient is not finite; once per attempt.
    - ``stalled``: no step and no epoch has begun or ended for ``stalled_s`` seconds, or a run that is pushed is silent.
      A paused run is not stalled.
    - ``no_improvement``: ``patience`` values of ``monitor`` in a row were no better than its best one.
    - ``disk``: the file system of the run's folder is full to ``disk_percent``.
    - ``finished``: the run ended otherwise: finished, stopped or cancelled.

    A webhook receives a POST with the fields of `sinks.alerts.rules.AlertMessage` as JSON; Slack and Mattermost show
    its ``text``, Discord its ``content``. A command gets the text as its last argument, and the other fields in
    environment variables such as ``STAGECAST_ALERT_KIND``. A message that cannot be sent is repeated as `Delivery`
    says, and the run shows that the sink fails.
    """

    to: str
    """``desktop`` (notify-send or osascript), the address of a webhook (``https://...``), or a command line."""
    when: list[Kind] = msgspec.field(default_factory=lambda: list(get_args(Kind)))
    """The conditions; by default all."""
    stalled_s: Annotated[float, Meta(gt=0)] = 600.0
    """Seconds without progress. Longer than the longest validation, whose batches are not events."""
    monitor: str = "val_loss"
    """The metric of ``no_improvement``, by its name in `RunResult.metrics`."""
    mode: Literal["min", "max"] = "min"
    """Whether smaller or larger values of it are better."""
    patience: Annotated[int, Meta(ge=1)] = 5
    """Values of it without an improvement."""
    disk_percent: Annotated[float, Meta(gt=0, le=100)] = 95.0

    def __repr__(self) -> str:
        # The address of a webhook is a secret.
        return f"Alert({self.shown_to!r}, when={self.when!r})"

    @property
    def shown_to(self) -> str:
        """The target without its secrets."""
        return f"https://{urlsplit(self.to).hostname}/..." if "://" in self.to else self.to

    # Of many steps only the newest is needed, to know that there was one.
    delivery: ClassVar[Delivery] = Delivery(
        types=EVENTS, overflow="latest", latency_s=0.5, timeout_s=300.0, retries=1_000
    )

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):  # a Struct's constructor does not validate
            try:
                msgspec.convert(getattr(self, field.name), field.type)
            except msgspec.ValidationError as error:
                known = f"; the conditions are {', '.join(get_args(Kind))}" if field.name == "when" else ""
                raise ValueError(f"Alert({field.name}={getattr(self, field.name)!r:.80}): {error}{known}") from None

    def check(self) -> None:
        """Raise `SinkMisconfigured` if the target is unknown, or this machine lacks its program."""
        try:
            target_of(self.to)
        except ValueError as error:
            raise SinkMisconfigured(f"Alert: {error}") from None

    def open(self, run: RunInfo) -> AlertWriter:
        """Begin to look at a run."""
        return self.open_after(run, 0)

    def open_after(self, run: RunInfo, seq: int) -> AlertWriter:
        """The same for a run that is under way: events up to this ``seq`` are taken into account, but not told."""
        limits = AlertLimits(self.stalled_s, self.monitor, self.mode, self.patience, self.disk_percent)
        try:
            target = target_of(self.to)
        except ValueError as error:
            raise SinkMisconfigured(f"Alert: {error}") from None
        return AlertWriter(target, Rules(limits, run.run_id, run.run_dir), frozenset(self.when), seq)


class AlertWriter:
    """An open `Alert`: the state of its rules, the messages that are not sent yet, and a thread for stalled runs.

    Args:
        kinds: Conditions that give messages.
        quiet_until: Events up to this ``seq`` give none.
    """

    def __init__(self, target: AlertTarget, rules: Rules, kinds: frozenset[Kind], quiet_until: int) -> None:
        self._target = target
        self._rules = rules
        self._kinds = kinds
        self._quiet_until = quiet_until
        self._pending: deque[AlertMessage] = deque(maxlen=_MOST_PENDING)
        self._taken = (0, 0)  # attempt and seq of the newest event that the rules have seen
        self._lock = threading.Lock()  # of the rules and the pending messages
        self._sending = threading.Lock()
        self._changed = threading.Event()
        self._closed = False
        self._watcher = threading.Thread(target=self._watch, name="stagecast-alert", daemon=True)
        self._watcher.start()

    def write(self, events: Sequence[Event]) -> None:
        """Judge a batch, and send what follows from it. Raises what the target raises; then the batch is repeated."""
        with self._lock:
            for event in events:
                if (event.attempt, event.seq) > self._taken:
                    self._taken = (event.attempt, event.seq)
                    messages = self._rules.take(event, time.time())
                    if event.seq > self._quiet_until:
                        self._add(*messages)
        self._changed.set()
        self._send()

    def close(self) -> None:
        """Send what is left. A run without a last event was killed."""
        with self._lock:
            self._closed = True
            self._add(self._rules.closed(time.time()))
        self._changed.set()
        self._watcher.join()
        self._send()

    def _add(self, *messages: AlertMessage | None) -> None:
        self._pending += [one for one in messages if one is not None and one.kind in self._kinds]

    def _send(self) -> None:
        with self._sending:
            while self._pending:
                self._target.send(self._pending[0])
                self._pending.popleft()

    def _watch(self) -> None:
        """Alert to a run that makes no progress, because no event does."""
        is_unsent = False
        while not self._closed:
            self._changed.clear()
            with self._lock:
                due = self._rules.due
            pause_s = None if due is None else max(0.0, due - time.time())
            self._changed.wait(_RETRY_S if is_unsent else pause_s)
            with self._lock:
                message = self._rules.look(time.time())
                self._add(message)
            if message is None and not is_unsent:
                continue
            try:
                self._send()
                is_unsent = False
            except Exception as error:  # of a target
                if not is_unsent:
                    logger.warning(f"an alert could not be sent, and is sent again: {error!r:.300}")
                is_unsent = True
