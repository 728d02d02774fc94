"""A page for Prometheus to scrape during a run.

A scrape reads current values without steps; for curves over steps use a sink that receives events.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import math
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from events.errors import SinkMisconfigured
from events.log import in_this_run, logger
from events.messages import Event
from events.safe_files import replace_below
from events.sink import Delivery, RunInfo, require
from events.strict import Strict
from sinks.connections import EXHAUSTED, REQUEST_S, ConnectionLimit, RatedWarning, address_group, hostname_of
from sinks.trackers.totals import STEP_BOUNDS_S, TOTALS_TYPES, Totals, label_text

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_MOST_CONNECTIONS = 16
"""Maximum connections at a time, each with a thread."""
_PAUSE_S = 0.5
"""Seconds without an accept after one has failed because of missing descriptors."""


class Prometheus(Strict, frozen=True):
    """Serves a run's metrics at ``http://HOST:PORT/metrics``, from its start to its end.

    Every series has the label ``run_id``. All metrics are one family, with their names in `events.metrics.metrics_of`:
    ``stagecast_metric{name="val_loss"}``. Other families are ``stagecast_steps_total``, ``stagecast_step_seconds`` (a
    histogram), ``stagecast_run_state{state="running"}``, ``stagecast_checkpoints_total{outcome="saved"}``,
    ``stagecast_observer_failures_total{observer="..."}``, ``stagecast_ledger_seconds_total{row="data"}`` (the stall
    ledger), and more. Histograms, images, sounds, tables and texts that user code logs are skipped.

    A run with a folder writes its address to ``prometheus-RUN.json`` next to that folder, for Prometheus's discovery,
    and removes it at the end: a ``file_sd_configs`` with ``files: [runs/prometheus-*.json]`` finds all runs (Prometheus
    only allows a wildcard in the last part of a path). Concurrent runs on one machine need different ports.

    It runs in the sink host, so that scrapes do not slow down training. Its counters restart at zero if the host dies.
    ``(Prometheus(), Delivery(runs_in="thread"))`` serves from the training process and does not need a journal.

    If the page was scraped during the run, the end of the run waits up to ``linger_s`` for a scrape of its final state.
    """

    host: str = "127.0.0.1"
    """The address to listen on: by default, only this machine can read it. ``0.0.0.0``: every machine that can reach
    this one, without a password."""
    port: int = 9464
    """0 selects a free one, which the log and the discovery file name."""
    max_names: int = 1_000
    """Maximum distinct metric names; each is a series in Prometheus. Further names are skipped with a warning."""

    hosts: tuple[str, ...] = ()
    """Allowed names in the ``Host`` header, besides IP addresses, ``localhost``, ``host`` and this machine's name.
    Others are refused, because a foreign web page could make them resolve to this machine (DNS rebinding)."""

    linger_s: float = 15.0
    """Seconds that the end of a run waits for a scrape of its final state. ``drain_timeout_s`` bounds it, too."""

    # Lossless, because a step that `latest` or `drop_oldest` drops would be missing in the counters. Scrapes are
    # seconds apart, so a delay of one second does not show, and wakes this thread rarely.
    delivery: ClassVar[Delivery] = Delivery(
        types=TOTALS_TYPES, overflow="catch_up", latency_s=1.0, timeout_s=30.0, runs_in="process"
    )

    def check(self) -> None:
        """See that the client is installed and the address is one.

        Raises:
            SinkMisconfigured: It is not.
        """
        require("prometheus_client", "prometheus", "the sink Prometheus")
        if not _is_host(self.host):
            raise SinkMisconfigured(
                f"Prometheus(host={self.host!r:.200}) is not a host name or IP address; set the port with port="
            )
        if not (isinstance(self.port, int) and 0 <= self.port <= 65_535):
            raise SinkMisconfigured(
                f"Prometheus(port={self.port!r:.80}) is not a port; give 1 to 65535, or 0 for a free one"
            )
        for name in self.hosts if isinstance(self.hosts, tuple | list) else (self.hosts,):
            if not isinstance(name, str) or hostname_of(name) is None:
                raise SinkMisconfigured(f"Prometheus(hosts=[{name!r:.200}]) is not a host name; give it without a port")
        if not (isinstance(self.max_names, int) and self.max_names >= 1):
            raise SinkMisconfigured(f"Prometheus(max_names={self.max_names!r:.80}): max_names must be >= 1")
        if not (isinstance(self.linger_s, int | float) and 0 <= self.linger_s < math.inf):
            raise SinkMisconfigured(f"Prometheus(linger_s={self.linger_s!r:.80}): give seconds, 0 or more")

    def open(self, run: RunInfo) -> PrometheusWriter:
        """Start the server. Looking up a host name may wait.

        Raises:
            SinkMisconfigured: As `check`.
            OSError: The port is taken, or the address is not this machine's. Trying again may help: the run that holds
                the port may be about to end.
        """
        self.check()
        from prometheus_client import CollectorRegistry, make_wsgi_app

        totals = Totals(self.max_names, "Prometheus")
        # Its own registry, because the global one belongs to the program, and two runs would collide in it.
        registry = CollectorRegistry(auto_describe=True)
        registry.register(_Collector(totals, label_text(run.run_id)))
        try:
            server = _Server(self.host, self.port, self.hosts)
        except OSError as error:
            raise OSError(
                error.errno,
                f"Prometheus cannot listen on {_address(self.host, self.port)} ({error.strerror}); free the port, or"
                f" set port=0 for a free one",
            ) from error
        server.set_app(make_wsgi_app(registry))
        return PrometheusWriter(server, totals, None if run.run_dir is None else _file_of(run.run_dir), self.linger_s)


class PrometheusWriter:
    """An open `Prometheus`. Counts on the sink's thread, and answers on threads of its own."""

    def __init__(self, server: _Server, totals: Totals, file: Path | None, linger_s: float) -> None:
        self._linger_s = linger_s
        self.url = f"http://{_address(server.host, server.server_port)}/metrics"
        """The page's address."""
        self._server = server
        self._totals = totals
        self._file = file
        # Each poll for the server's end takes the interpreter lock from the loop.
        self._thread = threading.Thread(
            target=in_this_run(server.serve_forever), args=(0.25,), name="stagecast-prometheus-http", daemon=True
        )
        self._thread.start()
        logger.info(f"Prometheus can scrape {self.url}")
        self._announce()

    def write(self, events: Sequence[Event]) -> None:
        """Count a batch. Only waits for a scrape that copies the numbers."""
        self._totals.take(events)

    def close(self) -> None:
        """Wait for a last scrape, if there were any, and stop serving; the port is free when this returns."""
        self._server.closing.set()
        if self._server.scraped.is_set():
            self._server.scraped_last.wait(self._linger_s)
        if self._file is not None:
            with contextlib.suppress(OSError):  # it may not have been written, or the folder was deleted
                self._file.unlink()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _announce(self) -> None:
        if self._file is None:
            return
        # A server on all addresses is reached by the machine's name.
        host = self._server.host if self._server.host not in ("0.0.0.0", "::") else socket.gethostname()
        # Without the run's name, because these labels would override those of the page.
        groups = [{"targets": [_address(host, self._server.server_port)], "labels": {"job": "stagecast"}}]
        try:
            text = json.dumps(groups, indent=2) + "\n"
            replace_below(self._file.parent, self._file.name, text.encode(), durable=False)
        except OSError as error:
            logger.warning(f"Prometheus cannot write its address, {self.url}, to {self._file} ({error.strerror})")


class _Collector:
    """Converts the totals to the client's families.

    Not its counters and gauges: in a program that sets ``PROMETHEUS_MULTIPROC_DIR`` these write files that the
    program's own page would show, and they could not be read all at one moment.
    """

    def __init__(self, totals: Totals, run_id: str) -> None:
        self._totals = totals
        self._run_id = run_id

    def collect(self) -> Iterator[Metric]:
        """Called for each scrape, on the thread that answers it."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        families, steps = self._totals.read()
        for family, samples in families:
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(f"stagecast_{family.name}", family.help, labels=("run_id", *family.labels))
            for labels, value in samples.items():
                metric.add_metric((self._run_id, *labels), value)
            yield metric
        within, buckets = 0, []
        for bound, count in zip((*map(str, STEP_BOUNDS_S), "+Inf"), steps.buckets, strict=True):
            within += count
            buckets.append((bound, float(within)))
        histogram = HistogramMetricFamily(
            "stagecast_step_seconds", "Time from step to step, the wait for data included.", labels=("run_id",)
        )
        histogram.add_metric((self._run_id,), buckets, steps.sum_s)
        yield histogram


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def handle(self) -> None:
        """Answer one request, and record the last scrape."""
        server = self.server
        assert isinstance(server, _Server)
        self._errors = io.StringIO()
        is_last = server.closing.is_set()  # before the numbers are read, so that they are the final ones
        self._is_scrape = False
        super().handle()
        if errors := self._errors.getvalue().strip():
            server.failed(errors.rpartition("\n")[2][:200])
        elif self._is_scrape and is_last:
            server.scraped_last.set()

    def parse_request(self) -> bool:
        """Read the request; returns False, after an error response, if it is not for this page."""
        if not super().parse_request():
            return False
        server = self.server
        assert isinstance(server, _Server)
        server.extend(self.request)
        given = self.headers.get_all("host") or []
        if len(given) != 1 or not server.has_name(given[0]):
            self.send_error(421, "allow this host name with Prometheus(hosts=[...])")
            return False
        self._is_scrape = True
        server.scraped.set()  # before the answer, after which the client may end the run
        return True

    def get_stderr(self) -> io.StringIO:
        """Discard the traceback of a failed answer, which would go to stderr each time."""
        return self._errors

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: the base class writes to stderr at each scrape."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Answers each request on a thread of its own, so that a client that hangs does not delay the others."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, host: str, port: int, hosts: Iterable[str] = ()) -> None:
        self.host = host
        self.closing, self.scraped, self.scraped_last = threading.Event(), threading.Event(), threading.Event()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._names = {hostname_of(name) for name in (*hosts, host, "localhost", socket.gethostname())} - {None}
        self._limit = ConnectionLimit(_MOST_CONNECTIONS)
        self._deadlines: dict[socket.socket, float] = {}
        """The deadline of each open connection; those with a complete request come last."""
        self._lock = threading.Lock()  # around the deadlines
        self._refused = RatedWarning("Prometheus closed a connection: too many clients, or too few descriptors")
        self.failed = RatedWarning("an answer to Prometheus failed: ")
        super().__init__((host, port), _Handler)

    def has_name(self, host: str) -> bool:
        """Whether a ``Host`` header is allowed."""
        name = hostname_of(host)
        if name is None or name in self._names:
            return name is not None
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def get_request(self) -> tuple[socket.socket, object]:
        """Accept a connection; pauses when the process has no descriptors, instead of spinning."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._refused()
                time.sleep(_PAUSE_S)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether to keep a connection: beyond the limit, the oldest without a complete request is closed."""
        group = address_group(client_address)
        is_kept = not self._limit.reserves(request)
        if is_kept and (self._limit.is_full() or self._limit.is_full_for(group)):
            is_kept = self._shut_down_oldest() and self._has_room()
        if not is_kept:
            self._refused()
            return False
        self._limit.add(request, group)
        with self._lock:
            self._deadlines[request] = time.monotonic() + REQUEST_S
        return True

    def extend(self, request: socket.socket) -> None:
        """Restart the timeout of a client with a complete request, for reading the answer."""
        with self._lock:
            if request in self._deadlines:
                self._deadlines[request] = time.monotonic() + 2 * REQUEST_S

    def service_actions(self) -> None:
        """Shut down connections after their deadline; called a few times a second."""
        now = time.monotonic()
        with self._lock:
            late = [request for request, deadline in self._deadlines.items() if deadline < now]
        for request in late:
            self._shut_down(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        with self._lock:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def server_bind(self) -> None:
        """Bind without a name service lookup of the machine's full name, which may hang."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host, self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that left early is not an error."""
        logger.debug(f"a scrape by {client_address} failed", exc_info=True)

    def _has_room(self) -> bool:
        """Whether the threads of connections that were shut down have closed them; waits a moment for that."""
        deadline = time.monotonic() + _PAUSE_S
        while self._limit.is_full() and self._limit.count >= self._limit.most + 2:  # `is_full` updates the count
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_S / 50)
        return True

    def _shut_down_oldest(self) -> bool:
        with self._lock:
            waiting = {one: at for one, at in self._deadlines.items() if at <= time.monotonic() + REQUEST_S}
        if not waiting:
            return False
        self._shut_down(min(waiting, key=waiting.__getitem__))
        return True

    def _shut_down(self, request: socket.socket) -> None:
        """Shut down a connection, which its thread then closes."""
        with self._lock:
            self._deadlines.pop(request, None)
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)


def _file_of(run_dir: str) -> Path:
    folder = Path(run_dir).absolute()
    return folder.parent / f"prometheus-{folder.name}.json"


def _is_host(host: object) -> bool:
    if not isinstance(host, str):
        return False
    if ":" not in host:
        return len(host) <= 253 and _HOST_NAME.fullmatch(host) is not None
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
