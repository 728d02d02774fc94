"""Uploads under faults: no visible checkpoint is ever torn, and in the end nothing is left over.

Each injection sends one upload, with the removal of the checkpoint before it, through a proxy in front of a real
server, with one or two faults at random places. Then a reader looks, and then a new process continues.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from faults.child import started
from faults.injections import injected
from faults.servers import Server
from support.checkpoints import make
from support.faulty_proxy import Fault, FaultyProxy

from events.checkpoint.files import verify
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.objects import Limits, run_url
from events.checkpoint.remote import RemoteStore
from events.checkpoint.remote_layout import PARTS_NAME, folders_of, parts_of, visible
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CheckpointStore
from events.errors import UploadError
from events.messages import CheckpointUploaded, Event
from events.origin import Origin
from sinks.checkpoints.uploader import CheckpointUploader

KINDS = ("500", "stall", "reset", "cancel", "kill")
PART = 2**16
SETTINGS: dict[str, Any] = {"keep_last": 1, "upload_part_bytes": PART}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL are POSIX")


class Run:
    """The folder of a run, and its place in the store."""

    def __init__(self, folder: Path, url: str) -> None:
        self.store = CheckpointStore(folder / "checkpoints")
        self.url = url
        self.folder = folder
        self.events: list[Event] = []
        self.attempt = 0
        self.reader = RemoteStore(url)  # connects on first use: never through the proxy
        self._looks = 0

    def begin(self, step: int) -> CheckpointName:
        """Start a new attempt, with one checkpoint of several parts."""
        names = self.store.names()
        self.attempt += 1
        parent = str(names[-1]) if names else None
        self.store.prepare(AttemptNote(self.attempt, parent))
        return make(
            self.store.folder, step, self.attempt, parent=parent, metric=None, tensors=3 * PART + 777, state=500
        ).name

    def uploader(self, limits: Limits | None = None, part_bytes: int = PART) -> CheckpointUploader:
        settings = Checkpoints(**SETTINGS | {"upload_part_bytes": part_bytes})
        origin = Origin("run", self.attempt)
        return CheckpointUploader(self.store, self.url, settings, self.events.append, origin, lambda: None, limits)

    def look(self) -> list[CheckpointName]:
        """Verify everything that a reader elsewhere sees."""
        names = self.reader.names()
        for name in names:
            self._looks += 1
            verify(self.reader.download(name, self.folder / f"look{self._looks}"), self.reader.manifest(name))
        return names

    def orphans(self) -> set[str]:
        """Objects that do not belong to a visible checkpoint."""
        sizes = self.reader._objects.sizes()
        keys = {key for key in sizes if not key.startswith("attempt-")}
        for name in visible(folders_of(sizes)):
            keys -= {f"{name}/{PARTS_NAME}", f"{name}/manifest.json"}
            part_bytes = self.reader._parts(name).part_bytes
            for file, entry in self.reader.manifest(name).files.items():
                keys -= {f"{name}/{part.key}" for part in parts_of(file, entry.nbytes, part_bytes)}
        return keys


class Bench:
    """A server, and the proxy in front of it."""

    def __init__(self, server: Server, proxy: FaultyProxy) -> None:
        self.server = server
        self.proxy = proxy
        self._requests = 0

    def use(self, monkeypatch: pytest.MonkeyPatch, *, faulty: bool) -> None:
        """New connections go through the proxy, or not."""
        for name, value in self.server.environment(self.proxy.port if faulty else None).items():
            monkeypatch.setenv(name, value)

    def run(self, folder: Path, name: str) -> Run:
        return Run(folder, run_url(f"{self.server.url}/faults", name))

    def requests_of_an_upload(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
        """The number of requests without a fault."""
        if not self._requests:
            run = self.run(folder / "clean", f"clean {folder.name}")
            run.folder.mkdir()
            for step, faulty in ((10, False), (20, True)):
                self.use(monkeypatch, faulty=faulty)
                self.proxy.arm()
                run.begin(step)
                run.uploader().open()
            self._requests = len(self.proxy.requests)
            self.use(monkeypatch, faulty=False)
            assert [str(name) for name in run.look()] == ["step-20.a2"]
        return self._requests

    def upload_in_child(self, run: Run, limits: Limits, fault: Fault) -> int:
        """Upload in a process that the fault kills; return how it ended."""
        known, pids = threading.Event(), [0]

        def kill() -> None:
            known.wait(30)
            os.kill(pids[0], signal.SIGKILL)

        self.proxy.arm(fault._replace(act=kill))
        job = {"folder": run.store.folder, "url": run.url, "attempt": run.attempt, "settings": SETTINGS}
        environment = self.server.environment(self.proxy.port)
        with started("upload", environment, limits=msgspec.to_builtins(limits), **job) as process:
            pids[0] = process.pid
            known.set()
            return process.wait()

    def inject(self, injection: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = random.Random(injection)
        kind = KINDS[injection % len(KINDS)]
        count = self.requests_of_an_upload(monkeypatch, folder)
        faults = [
            Fault(rng.randrange(count), rng.random() < 0.5, rng.random(), kind)  # type: ignore[arg-type]
            for _ in range(1 if kind == "kill" else rng.choice((1, 1, 2)))
        ]
        limits = Limits(
            connect_s=5.0,
            request_s=0.4,
            slowest_bytes_per_s=2**22,
            retries=rng.choice((0, 0, 1)),
            retry_s=1.0,
            parallel=rng.randint(1, 4),
        )
        run = self.run(folder, f"run {injection} of {folder.name}")
        self.use(monkeypatch, faulty=False)
        run.begin(10)
        run.uploader().open()
        run.begin(20)

        self.use(monkeypatch, faulty=True)
        if kind == "kill":
            assert self.upload_in_child(run, limits, faults[0]) == -signal.SIGKILL
        else:
            uploader = run.uploader(limits)
            act = uploader.abandon if kind == "cancel" else kind
            self.proxy.arm(*(fault._replace(act=act) for fault in faults))
            for _ in range(rng.choice((1, 1, 3))):  # as the supervisor does, until this process ends
                try:
                    uploader.open()
                    break
                except UploadError:
                    continue
        self.proxy.settle()
        assert self.proxy.fired

        self.use(monkeypatch, faulty=False)
        assert run.look()  # the earlier one is only removed after the upload of the later one
        run.attempt += 1
        run.store.prepare(AttemptNote(run.attempt, "step-20.a2"))
        run.uploader(part_bytes=rng.choice((PART, PART, 2 * PART))).open()
        assert str(run.reader.names()[-1]) == "step-20.a2"
        assert run.orphans() == set()
        newest = run.begin(30)
        run.uploader().open()
        assert run.look() == [newest]
        assert run.orphans() == set()
        assert not [line for line in self.proxy.requests if "uploads" in line or "comp=block" in line]
        if self.server.scheme == "s3":
            assert self.server.multipart_uploads() == []
        uploaded = [event.checkpoint for event in run.events if isinstance(event, CheckpointUploaded)]
        assert len(uploaded) == len(set(uploaded))
        assert uploaded[-1] == str(newest)
        run.reader.remove(newest)  # it would fill the server's memory


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    server = request.getfixturevalue(request.param)
    with FaultyProxy(server.port) as proxy:
        yield Bench(server, proxy)


@injected(
    "bench, injection",
    [(server, number) for server in ("s3", "azure") for number in range(200)],
    10,
    indirect=["bench"],
)
def test_no_torn_checkpoint_is_ever_visible_and_no_orphan_stays(
    bench: Bench, injection: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error, a hang, a reset connection, a cancellation, a killed process, anywhere in an upload."""
    bench.inject(injection, tmp_path, monkeypatch)
