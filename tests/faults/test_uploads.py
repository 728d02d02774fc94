"""Uploads under faults: no checkpoint that is visible is ever torn, and in the end nothing is left over.

Each injection takes one upload, with the removal of the checkpoint before it, through a proxy in front of a real
server, and lets one or two things go wrong at random places. Then a reader looks, and then a new process takes it up.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.nursery import ROOT, Popen

from events.checkpoint import disk
from events.checkpoint.files import verify
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName, FileEntry, Manifest
from events.checkpoint.objects import Limits, run_url
from events.checkpoint.remote import RemoteStore
from events.checkpoint.remote_layout import PARTS_NAME, folders_of, parts_of, visible
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CheckpointStore
from events.errors import UploadError
from events.messages import CheckpointUploaded, Event
from events.origin import Origin
from sinks.checkpoints.uploader import CheckpointUploader

INJECTIONS = {
    "test_s3_never_shows_a_torn_checkpoint_and_keeps_no_orphan": (10, 200),
    "test_azure_never_shows_a_torn_checkpoint_and_keeps_no_orphan": (0, 200),
}
KINDS = ("500", "stall", "reset", "cancel", "kill")
UPLOADER = Path(__file__).with_name("upload_child.py")
PART = 2**16
SETTINGS: dict[str, Any] = {"keep_last": 1, "upload_part_bytes": PART}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL are POSIX")


class Run:
    """One run: its folder, and its place in the store."""

    def __init__(self, folder: Path, url: str) -> None:
        self.store = CheckpointStore(folder / "checkpoints")
        self.url = url
        self.folder = folder
        self.events: list[Event] = []
        self.attempt = 0
        self.reader = RemoteStore(url)  # connects when it is first used: never through the proxy
        self._looks = 0

    def begin(self, step: int) -> CheckpointName:
        """A new attempt, with one checkpoint of several parts."""
        names = self.store.names()
        self.attempt += 1
        self.store.prepare(AttemptNote(self.attempt, str(names[-1]) if names else None))
        name = CheckpointName(step, self.attempt)
        temporary = self.store.begin(name)
        noise = random.Random(str(name))
        files = {
            file: FileEntry(*disk.write_parts(temporary, file, [noise.randbytes(nbytes)]))
            for file, nbytes in (("tensors.bin", 3 * PART + 777), ("state.bin", 500))
        }
        place = {"run_id": "run", "attempt": self.attempt, "global_step": step, "epoch": 0, "seq": step, "time": 0.0}
        self.store.commit(Manifest(**place, parent=str(names[-1]) if names else None, reasons=[], files=files))
        return name

    def uploader(self, limits: Limits | None = None, part_bytes: int = PART) -> CheckpointUploader:
        settings = Checkpoints(**SETTINGS | {"upload_part_bytes": part_bytes})
        header = Origin("run", self.attempt).header
        return CheckpointUploader(self.store, self.url, settings, self.events.append, header, lambda: None, limits)

    def look(self) -> list[CheckpointName]:
        """As a reader elsewhere: whatever is visible is whole."""
        names = self.reader.names()
        for name in names:
            self._looks += 1
            verify(self.reader.download(name, self.folder / f"look{self._looks}"), self.reader.manifest(name))
        return names

    def orphans(self) -> set[str]:
        """Objects that belong to nothing that is visible."""
        sizes = self.reader._objects.sizes()
        keys = {key for key in sizes if not key.startswith("attempt-")}
        for name in visible(folders_of(sizes)):
            keys -= {f"{name}/{PARTS_NAME}", f"{name}/manifest.json"}
            part_bytes = self.reader._parts(name).part_bytes
            for file, entry in self.reader.manifest(name).files.items():
                keys -= {f"{name}/{part.key}" for part in parts_of(file, entry.nbytes, part_bytes)}
        return keys


class Bench:
    """A server, and the proxy before it."""

    def __init__(self, server: Any, proxies: Any) -> None:
        self.server = server
        self.fault = proxies.Fault
        self.proxy = proxies.FaultyProxy(server.port)
        self._clean: int | None = None

    def use(self, monkeypatch: pytest.MonkeyPatch, *, faulty: bool) -> None:
        """What connects from now on goes through the proxy, or does not."""
        for name, value in self.server.environment(self.proxy.port if faulty else None).items():
            monkeypatch.setenv(name, value)

    def run(self, folder: Path, name: str) -> Run:
        return Run(folder, run_url(f"{self.server.url}/faults", name))

    def requests_of_a_clean_upload(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
        """How many there are to choose from."""
        if self._clean is None:
            run = self.run(folder / "clean", f"clean {folder.name}")
            run.folder.mkdir()
            self.use(monkeypatch, faulty=False)
            run.begin(10)
            run.uploader().open()
            self.proxy.arm()
            self.use(monkeypatch, faulty=True)
            run.begin(20)
            run.uploader().open()
            self._clean = len(self.proxy.requests)
            self.use(monkeypatch, faulty=False)
            assert [str(name) for name in run.look()] == ["step-20.a2"]
        return self._clean

    def upload_in_child(self, run: Run, limits: Limits, faults: list[Any]) -> int:
        """Start an uploader, which the first fault that fires kills; returns how it ended."""
        known, pids = threading.Event(), [0]

        def kill() -> None:
            known.wait(30)
            os.kill(pids[0], signal.SIGKILL)

        self.proxy.arm(*(fault._replace(act=kill) for fault in faults))
        job = {
            "folder": str(run.store.folder),
            "url": run.url,
            "attempt": run.attempt,
            "settings": SETTINGS,
            "limits": msgspec.to_builtins(limits),
        }
        environment = {**os.environ, "PYTHONPATH": str(ROOT)} | self.server.environment(self.proxy.port)
        with Popen([sys.executable, str(UPLOADER), json.dumps(job)], env=environment) as process:
            pids[0] = process.pid
            known.set()
        return int(process.returncode)

    def inject(self, injection: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = random.Random(injection)
        kind = KINDS[injection % len(KINDS)]
        count = self.requests_of_a_clean_upload(monkeypatch, folder)
        faults = [
            self.fault(rng.randrange(count), rng.random() < 0.5, rng.random(), kind)
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
            assert self.upload_in_child(run, limits, faults) == -signal.SIGKILL
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
        assert run.look()  # the earlier one is removed only when the later one is there
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
        run.reader.remove(newest)  # or the server's memory would fill up

    def close(self) -> None:
        self.proxy.close()


def bench_of(server: Any, helpers: Any) -> Iterator[Bench]:
    bench = Bench(server, helpers("faulty_proxy"))
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def s3_bench(s3: Any, helpers: Any) -> Iterator[Bench]:
    yield from bench_of(s3, helpers)


@pytest.fixture(scope="module")
def azure_bench(azure: Any, helpers: Any) -> Iterator[Bench]:
    yield from bench_of(azure, helpers)


def test_s3_never_shows_a_torn_checkpoint_and_keeps_no_orphan(
    s3_bench: Bench, injection: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, a hang, a cut connection, a cancellation, a killed process, anywhere in an upload."""
    s3_bench.inject(injection, tmp_path, monkeypatch)


def test_azure_never_shows_a_torn_checkpoint_and_keeps_no_orphan(
    azure_bench: Bench, injection: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in front of the other protocol."""
    azure_bench.inject(injection, tmp_path, monkeypatch)
