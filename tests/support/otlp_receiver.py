"""A collector that receives OTLP over HTTP, in a thread, and keeps it."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACES, METRICS = "/v1/traces", "/v1/metrics"
Received = tuple[str, dict[str, str], bytes]


class Story:
    """What requests tell, decoded."""

    def __init__(self, received: Iterable[Received]) -> None:
        self.received = list(received)
        traces = [ExportTraceServiceRequest.FromString(body) for path, _, body in self.received if path == TRACES]
        self.resources = [resource_spans.resource for request in traces for resource_spans in request.resource_spans]
        self.spans: list[Any] = [
            span
            for request in traces
            for resource_spans in request.resource_spans
            for scope_spans in resource_spans.scope_spans
            for span in scope_spans.spans
        ]
        bodies = [body for path, _, body in self.received if path == METRICS]
        self.metrics: dict[str, Any] = {}
        """Those of the last request, by name."""
        if bodies:
            request = ExportMetricsServiceRequest.FromString(bodies[-1])
            self.resources += [one.resource for one in request.resource_metrics]
            self.metrics = {one.name: one for one in request.resource_metrics[0].scope_metrics[0].metrics}

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def number(self, metric_name: str, /, **labels: str) -> float | None:
        """The value of a metric's point."""
        metric = self.metrics[f"stagecast.{metric_name}"]
        for point in getattr(metric, metric.WhichOneof("data")).data_points:
            if plain(point.attributes) == labels:
                return float(point.as_double)
        return None


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value") or "string_value") for one in attributes}


class Receiver:
    """A collector in a thread. Its attributes say how it answers from now on."""

    def __init__(self, port: int = 0) -> None:
        self.received: list[Received] = []
        self.statuses: dict[str, int] = {}
        """What to answer with, by path; else 200."""
        self.answer_headers: dict[str, str] = {}
        self.answers: dict[str, bytes] = {}
        self.silent = False
        """Take requests and close the connection without an answer."""
        self.hanging = False
        """Take requests and answer when the receiver is closed."""
        self.released = threading.Event()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.receive = self._receive
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def _receive(self, handler: _Handler, body: bytes) -> None:
        self.received.append((handler.path, {name.lower(): value for name, value in handler.headers.items()}, body))
        if self.hanging:
            self.released.wait()
        if self.silent:
            handler.close_connection = True
            return
        status = self.statuses.get(handler.path, 200)
        handler.answer(status, self.answers.get(handler.path, b""), self.answer_headers)

    @property
    def story(self) -> Story:
        return Story(self.received)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    receive: Callable[[_Handler, bytes], None]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, _Server)
        self.server.receive(self, gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
