"""A made-up server for the page: it plays runs by the protocol of `sinks.live`, without training anything.

By hand: ``python tests/live/page_server.py --port 8123 --runs 3``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

PAGE = Path(__file__).parents[2] / "sinks" / "live" / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MOST_POINTS = 2_000
_LEDGER = {
    "compute": 0.72,
    "contention": 0.02,
    "data": 0.11,
    "readback": 0.03,
    "publish": 0.01,
    "inline": 0.02,
    "fence": 0.01,
    "backpressure": 0.0,
    "checkpoint": 0.02,
    "paused": 0.0,
    "other": 0.06,
}


class FakeRun:
    """One run, made up step by step. Only its server's event loop may use it once that has started."""

    def __init__(self, run_id: str, *, seed: int = 0, commands: bool = True, extra: list[str] | None = None) -> None:
        self.random = random.Random(seed)
        self.cursor = 0
        self.attempt = 1
        self.series: dict[str, dict[str, Any]] = {}
        self.log: list[dict[str, Any]] = []
        self.checkpoints: dict[str, dict[str, Any]] = {}
        self.observers: dict[str, dict[str, Any]] = {}
        self.ranks: list[dict[str, Any]] = []
        self.media: list[dict[str, Any]] = []
        self.files: dict[str, tuple[bytes, str]] = {}
        self.histograms: dict[str, list[dict[str, Any]]] = {}
        self.extra = extra or []
        self.commands: list[dict[str, Any]] = []
        self.hellos: list[dict[str, Any]] = []
        self.watchers: set[asyncio.Queue[Any]] = set()
        now = time.time()
        self.clock = now - 3_600
        self.run: dict[str, Any] = {
            "run_id": run_id,
            "attempt": 1,
            "status": "running",
            "reason": None,
            "module": "digits.Classifier",
            "device": "cuda:0",
            "host": "node-07",
            "started": self.clock,
            "updated": now,
            "global_step": 0,
            "epoch": 0,
            "epochs": 20,
            "steps_per_epoch": 1_000,
            "max_steps": None,
            "paused": False,
            "commands": commands,
            "latest": {},
        }

    def point(self, points: dict[str, Any], name: str, value: float | str) -> None:
        """Add a value to a series, and to the points of a frame."""
        step = self.run["global_step"]
        series = self.series.setdefault(
            name, {"step": [], "mean": [], "min": [], "max": [], "time": [], "count": 0, "last": None, "nonfinite": {}}
        )
        at = len(series["step"])
        finite = value if isinstance(value, float | int) else None
        if finite is None:
            series["nonfinite"][str(at)] = value
        for column, one in (("step", step), ("time", self.clock), ("mean", finite), ("min", finite), ("max", finite)):
            series[column].append(one)
        series["count"] += 1
        series["last"] = value
        if at + 1 > MOST_POINTS:
            for column in ("step", "time", "mean", "min", "max"):
                series[column] = series[column][1::2]
            series["nonfinite"] = {}
        self.run["latest"][name] = value
        steps, values = points.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)

    def advance(self, steps: int, *, step_s: float = 0.12) -> dict[str, Any]:
        """Train some steps; return their frame."""
        points: dict[str, Any] = {}
        noise = self.random.gauss
        plan = self.run["steps_per_epoch"]
        frame: dict[str, Any] = {"log": [], "checkpoints": [], "histograms": {}}
        for _ in range(steps):
            self.run["global_step"] += 1
            step = self.run["global_step"]
            self.run["epoch"] = step // plan
            self.clock += step_s
            base = 2.3 * math.exp(-step / 2_500) + 0.25
            spent = step_s * (1 + abs(noise(0, 0.08)))
            self.point(points, "train_loss", base * (1 + noise(0, 0.07)))
            self.point(points, "lr", 3e-4 * min(1, step / 400) * 0.5 * (1 + math.cos(math.pi * step / (20 * plan))))
            self.point(points, "grad_norm", abs(0.8 + base * 0.3 + noise(0, 0.15)))
            self.point(points, "step_s", spent)
            self.point(points, "rows_per_s", 64 / spent)
            for name in self.extra:
                self.point(points, name, math.sin(step / 300 + len(name)) + noise(0, 0.1))
            if step % 50 == 0:
                self._interval(points)
            if step % 250 == 0:
                self._validate(points, base)
            if step % 500 == 0:
                self.save(frame)
            if step % plan == 0:
                text = f"epoch {self.run['epoch']} of 20 · train loss {base:.4f} · val loss {base * 1.05:.4f}"
                frame["log"].append(self.line("TrainEpochEnded", text))
        self.cursor += max(1, steps)
        self.run["updated"] = time.time()
        names = ("global_step", "epoch", "updated")
        frame["run"] = {name: self.run[name] for name in names}
        frame["points"] = points
        return frame

    def line(self, kind: str, text: str, level: str = "info") -> dict[str, Any]:
        entry = {"seq": self.cursor, "time": self.clock, "global_step": self.run["global_step"]}
        entry |= {"epoch": self.run["epoch"], "level": level, "kind": kind, "text": text}
        self.log.append(entry)
        del self.log[:-1_000]
        return entry

    def _interval(self, points: dict[str, Any]) -> None:
        step = self.run["global_step"]
        stall = 0.25 if step % 2_000 < 300 else 0.0
        parts = {name: max(0.0, share * (1 + self.random.gauss(0, 0.15))) for name, share in _LEDGER.items()}
        parts["data"] += stall
        whole = sum(parts.values())
        for name, part in parts.items():
            self.point(points, f"ledger/{name}_s", 6.0 * part / whole)
        self.point(points, "ledger/wall_s", 6.0)
        self.point(points, "ledger/device_idle_s", 6.0 * (0.18 + stall / 2))
        wave = math.sin(step / 900)
        for name, value in {
            "cpu_percent": 48 + 8 * wave,
            "process_cpu_percent": 31 + 5 * wave,
            "memory_used_bytes": 4.1e10 + 1e9 * wave,
            "process_memory_bytes": 1.2e10,
            "disk_used_percent": 61.5,
            "disk_read_bytes_per_s": 2.1e8 + 5e7 * wave,
            "disk_written_bytes_per_s": 3.3e7,
            "network_received_bytes_per_s": 1.1e6,
            "network_sent_bytes_per_s": 4.0e6,
            "gpu0/utilization_percent": 91 - 20 * stall,
            "gpu1/utilization_percent": 88 - 30 * stall,
            "gpu0/memory_used_bytes": 6.2e10,
            "gpu1/memory_used_bytes": 6.1e10,
            "gpu0/power_w": 610 + 30 * wave,
            "gpu0/temperature_c": 64 + 3 * wave,
        }.items():
            self.point(points, f"system/{name}", value + self.random.gauss(0, abs(value) * 0.01))

    def _validate(self, points: dict[str, Any], base: float) -> None:
        for key, factor in (("", 1.05), ("/hard set", 1.4)):
            self.point(points, f"val_loss{key}", base * factor * (1 + self.random.gauss(0, 0.02)))
            self.point(points, f"val_accuracy{key}", 1 - base * factor / 3.2)

    def save(self, frame: dict[str, Any]) -> None:
        """Take a checkpoint."""
        step = self.run["global_step"]
        name = f"step-{step:08d}"
        for older in list(self.checkpoints.values())[:-3]:
            if older["state"] == "durable":
                older["state"] = "deleted"
                frame["checkpoints"].append(older)
        self.checkpoints[name] = {
            "name": name,
            "global_step": step,
            "epoch": self.run["epoch"],
            "time": self.clock,
            "nbytes": 1_420_000_000,
            "durable_s": 2.31,
            "blocked_s": 0.041,
            "metric": 0.31,
            "reasons": ["interval"],
            "state": "durable",
            "upload": {"done_bytes": 1_420_000_000, "total_bytes": 1_420_000_000, "state": "uploaded"},
            "error": None,
        }
        frame["checkpoints"].append(self.checkpoints[name])
        frame["log"].append(self.line("CheckpointSaved", f"checkpoint {name} is durable (1.3 GiB in 2.3 s)"))

    def furnish(self) -> None:
        """Add observers, ranks, images, texts, histograms, and a failed checkpoint."""
        step = self.run["global_step"]
        for name, state, queued, lag, dropped, error in (
            ("console", "ok", 0, 0.004, 0, None),
            ("jsonl", "ok", 12, 0.031, 0, None),
            ("wandb", "failing", 904, 12.4, 0, "ConnectionError: api.wandb.ai: connection refused; retrying in 8 s"),
            ("tensorboard", "ok", 3, 0.2, 0, None),
            ("my_callback", "disabled", None, None, 1_204, "ZeroDivisionError: division by zero in on_train_step_end"),
        ):
            row = {"name": name, "state": state, "queued": queued, "lag_s": lag, "dropped": dropped, "conflated": 0}
            self.observers[name] = row | {"failures": 0 if error is None else 3, "error": error}
        for rank, before_s in enumerate((0.021, 0.020, 0.093, 0.022)):
            row = {"rank": rank, "host": f"node-{rank // 2}", "phase": "backward", "step_s": 0.12, "data_s": 0.002}
            row |= {"before_exchange_s": before_s, "is_slow": rank == 2, "memory_bytes": 3 * 2**30}
            row |= {"metrics": {"accuracy": 0.5 + 0.1 * rank}}
            self.ranks.append(row | {"device_memory_bytes": 61 * 2**30})
        for at in range(3):
            self.media.append(
                {"name": "samples", "kind": "image", "global_step": max(0, step - 1000 * (2 - at)), "path": f"{at}.png"}
                | {"width": 96, "height": 64, "text": None}
            )
        text = "The quick brown fox <b>jumps</b> over the lazy dog.\nSecond line of a generated text."
        self.media.append(
            {"name": "generated", "kind": "text", "global_step": step, "path": None, "text": text}
            | {"width": None, "height": None}
        )
        for name in ("gradients/encoder", "weights/head"):
            self.histograms[name] = [
                {
                    "step": max(0, step - 100 * (9 - at)),
                    "low": -0.4,
                    "high": 0.4,
                    "counts": [int(900 * math.exp(-(((bin_ - 15) / (3 + at / 2)) ** 2))) for bin_ in range(32)],
                }
                for at in range(10)
            ]
        if self.checkpoints:
            last = list(self.checkpoints.values())[-1]
            last["upload"] = {"done_bytes": 610_000_000, "total_bytes": 1_420_000_000, "state": "uploading"}
            name = f"step-{step + 1:08d}"
            self.checkpoints[name] = last | {
                "name": name,
                "global_step": step,
                "state": "failed",
                "upload": None,
                "error": "OSError: [Errno 28] No space left on device: '/scratch/run/checkpoints/.tmp'",
            }
        self.line("ObserverFailed", "wandb: ConnectionError: connection refused; retrying in 8 s", "warning")
        self.line("CheckpointFailed", f"checkpoint {step + 1}: No space left on device", "error")

    def snapshot(self) -> dict[str, Any]:
        return {
            "type": "snapshot",
            "cursor": self.cursor,
            "attempt": self.attempt,
            "run": self.run,
            "arguments": {"lr": 3e-4, "batch_size": 64, "data": {"root": "/data/digits", "workers": 4}},
            "versions": {"torch": "2.6.0", "stagecast": "0.1.0", "python": "3.11.7"},
            "series": self.series,
            "log": self.log,
            "checkpoints": list(self.checkpoints.values()),
            "observers": list(self.observers.values()),
            "ranks": self.ranks,
            "media": self.media,
            "histograms": self.histograms,
        }

    def row(self) -> dict[str, Any]:
        """Its row of the table of runs."""
        metrics = {name: [one["last"], one["last"], 1, 0, True] for name, one in self.series.items()}
        run: dict[str, Any] = dict.fromkeys(("left_s", "commit", "dirty", "command"))
        run |= {name: self.run[name] for name in ("status", "started", "updated", "epoch", "module", "device", "host")}
        run |= {"name": self.run["run_id"], "folder": self.run["run_id"], "step": self.run["global_step"]}
        run |= {"health": [], "problems": [], "total_steps": 20_000, "progress": 0.5, "duration_s": 60.0, "attempt": 1}
        noted = {"name": self.run.get("label", ""), "tags": [], "note": "", "colour": self.run.get("colour", "")}
        run["label"] = noted["name"] or run["name"]
        return run | {"monitored": "val_loss", "notes": noted, "config": {"lr": 3e-4}, "metrics": metrics}

    def tell(self, frame: dict[str, Any]) -> None:
        """Send a frame to all watchers."""
        message = {"type": "frame", "cursor": self.cursor, "time": time.time()}
        self.send(json.dumps(message | {name: value for name, value in frame.items() if value}))

    def send(self, message: str | int) -> None:
        """Send a text to all watchers, or close their connections with a code."""
        for watcher in self.watchers:
            watcher.put_nowait(message)


class PageServer:
    """Serves the page and some runs on its own thread; `call` changes a run there."""

    def __init__(
        self, runs: list[FakeRun], *, token: str | None = None, port: int = 0, websockets: bool = True
    ) -> None:
        self.runs = {run.run["run_id"]: run for run in runs}
        self.token = token
        self.allows_websockets = websockets
        self.is_silent = False
        self.is_refusing = False
        self.requests: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        app = Starlette(
            routes=[
                Route("/", self._index),
                Route("/page/{name}", self._page),
                Route("/api/runs", self._list),
                Route("/api/table", self._table),
                Route("/api/runs/{run_id}", self._snapshot),
                Route("/api/runs/{run_id}/events", self._events),
                Route("/api/runs/{run_id}/commands", self._post, methods=["POST"]),
                Route("/api/runs/{run_id}/media/{path:path}", self._media),
                WebSocketRoute("/api/runs/{run_id}/ws", self._ws),
            ]
        )
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="websockets-sansio")
        config.timeout_graceful_shutdown = 1
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._started = threading.Event()

    def _serve(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            alive = asyncio.create_task(self._alive())
            self._started.set()
            await self._server.serve(sockets=[self._socket])
            alive.cancel()

        asyncio.run(main())

    def start(self) -> PageServer:
        self._thread.start()
        self._started.wait()
        return self

    def stop(self) -> None:
        self.call(lambda: self.close_all(1001))
        self._server.should_exit = True
        self._thread.join(10)

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a function on the server's thread; its result."""
        assert self._loop is not None

        async def on_loop() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(10)

    def train(self, run: FakeRun, steps: int) -> None:
        self.call(lambda: run.tell(run.advance(steps)))

    def play(self, run: FakeRun, *, frames_per_s: float, steps: int) -> None:
        """Let a run train until the server ends."""
        assert self._loop is not None

        async def go() -> None:
            while True:
                await asyncio.sleep(1 / frames_per_s)
                if not run.run["paused"] and run.run["status"] == "running":
                    run.tell(run.advance(steps))

        self._playing = asyncio.run_coroutine_threadsafe(go(), self._loop)

    def close_all(self, code: int) -> None:
        """Close the connections of all watchers, on the server's thread."""
        for run in self.runs.values():
            run.send(code)

    async def _alive(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if not self.is_silent:
                for run in self.runs.values():
                    run.tell({})

    def _note(self, request: Request) -> None:
        self.requests.append(str(request.url))

    def _refused(self, request: Request) -> Response | None:
        self._note(request)
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": "this server requires its token"}, 401, {"www-authenticate": "Bearer"})
        if request.path_params.get("run_id", next(iter(self.runs), None)) not in self.runs and self.runs:
            return JSONResponse({"error": "there is no such run"}, 404)
        return None

    async def _index(self, request: Request) -> Response:
        self._note(request)
        return FileResponse(PAGE / "index.html", headers={"content-security-policy": CSP})

    async def _page(self, request: Request) -> Response:
        self._note(request)
        path = PAGE / request.path_params["name"]
        if not path.is_file():
            return Response(status_code=404)
        return FileResponse(path, headers={"cache-control": "no-cache"})

    async def _list(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"runs": [run.run for run in self.runs.values()]})

    async def _table(self, request: Request) -> Response:
        wanted = request.query_params.get("filter", "")
        rows = [run.row() for name, run in self.runs.items() if re.search(wanted, name)]
        answer = {"now": time.time(), "total": len(rows), "is_behind": False, "notes": False, "cursor": ""}
        return self._refused(request) or JSONResponse(answer | {"rows": rows})

    async def _snapshot(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse(self.runs[request.path_params["run_id"]].snapshot())

    async def _media(self, request: Request) -> Response:
        files = self.runs[request.path_params["run_id"]].files
        data, media_type = files.get(request.path_params["path"], (_png(96, 64), "image/png"))
        return self._refused(request) or Response(data, media_type=media_type)

    async def _post(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        command = await request.json()
        return JSONResponse(self._take(self.runs[request.path_params["run_id"]], command), 202)

    def _take(self, run: FakeRun, command: dict[str, Any]) -> dict[str, Any]:
        run.commands.append(command)
        if self.is_refusing:
            return {"type": "refused", "id": command["id"], "reason": "the run is not under way"}
        if command["command"] in ("pause", "resume"):
            run.run["paused"] = command["command"] == "pause"
            run.tell({"run": {"paused": run.run["paused"]}})
        elif command["command"] == "stop":
            run.run["status"] = "stopped"
            run.tell({"run": {"status": "stopped", "reason": command["reason"]}})
        return {"type": "sent", "id": command["id"]}

    async def _events(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        run = self.runs[request.path_params["run_id"]]

        async def stream() -> Any:
            with self._watch(run) as watcher:
                yield f"event: snapshot\ndata: {json.dumps(run.snapshot())}\n\n"
                while isinstance(text := await watcher.get(), str):
                    yield f"event: frame\ndata: {text}\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @contextlib.contextmanager
    def _watch(self, run: FakeRun) -> Any:
        watcher: asyncio.Queue[Any] = asyncio.Queue()
        run.watchers.add(watcher)
        try:
            yield watcher
        finally:
            run.watchers.discard(watcher)

    async def _ws(self, socket: WebSocket) -> None:
        run = self.runs.get(socket.path_params["run_id"])
        if not self.allows_websockets:
            await socket.close()
            return
        await socket.accept()
        try:
            hello = await socket.receive_json()
            wrong = self.token is not None and hello["token"] != self.token
            if wrong or run is None:
                await socket.close(4401 if wrong else 4404)
                return
            run.hellos.append(hello)
            with self._watch(run) as watcher:
                if hello["since"] != run.cursor or hello["attempt"] != run.attempt:
                    await socket.send_text(json.dumps(run.snapshot()))
                listening = asyncio.create_task(self._listen(socket, run, watcher))
                try:
                    while isinstance(message := await watcher.get(), str):
                        await socket.send_text(message)
                    await socket.close(message)
                finally:
                    listening.cancel()
        except (WebSocketDisconnect, RuntimeError):
            return

    async def _listen(self, socket: WebSocket, run: FakeRun, watcher: asyncio.Queue[Any]) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                message = await socket.receive_json()
                if message["type"] == "snapshot":
                    watcher.put_nowait(json.dumps(run.snapshot()))
                else:
                    watcher.put_nowait(json.dumps(self._take(run, message["command"])))
        watcher.put_nowait(1000)


def _png(width: int, height: int) -> bytes:
    """A colour gradient."""
    rows = b"".join(
        b"\0" + b"".join(bytes((x * 255 // width, y * 255 // height, 140)) for x in range(width)) for y in range(height)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8_000, help="that the runs have made already")
    parser.add_argument("--metrics", type=int, default=6, help="names that the user logs")
    parser.add_argument("--rate", type=float, default=8.0, help="frames in a second")
    args = parser.parse_args()
    names = [
        f"layer{index // 4}/{('activation', 'norm', 'entropy', 'sparsity')[index % 4]}" for index in range(args.metrics)
    ]
    runs = [FakeRun(f"digits-{index + 1:03d}", seed=index, extra=names) for index in range(args.runs)]
    for index, run in enumerate(runs):
        run.advance(args.steps - 900 * index, step_s=0.12 + 0.03 * index)
        run.clock = time.time()
        run.furnish()
        if index:
            run.run |= {"status": ("finished", "failed", "lost")[(index - 1) % 3], "commands": False}
    server = PageServer(runs, port=args.port).start()
    server.play(runs[0], frames_per_s=args.rate, steps=1)
    print(server.url)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    server.stop()


if __name__ == "__main__":
    main()
