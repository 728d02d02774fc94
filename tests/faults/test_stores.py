"""The contract of every store of checkpoints: a folder, ``file://`` and a real S3 server."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from support.checkpoints import make, put

from events.checkpoint.files import verify
from events.checkpoint.lineage import AttemptNote, Lineage
from events.checkpoint.manifest import CheckpointName, Manifest, encode_manifest
from events.checkpoint.objects import run_url
from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew

REMOTE = ["file", "s3"]
EXAMPLES = {"folder": 10, "file": 6, "s3": 1}
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where an fsync takes no time


class Rig:
    """A store, and the ways in which a run changes it."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self.local = CheckpointStore(folder / "local")
        self.remote = RemoteStore(run_url(url, folder.name)) if url is not None else None
        self.store: Lineage = self.remote or self.local

    def save(self, step: int, attempt: int = 1, **options: Any) -> Manifest:
        manifest = make(self.local.folder, step, attempt, **options)
        if self.remote is not None:
            assert put(self.remote, self.local.folder, manifest)
        return manifest

    def remove(self, name: CheckpointName) -> None:
        (self.remote or self.local).remove(name)

    def note(self, notes: dict[int, AttemptNote]) -> None:
        if self.remote is not None:
            self.remote.note(notes.values())
        else:
            self.local.folder.mkdir(exist_ok=True)
            for one in notes.values():
                self.local.note(one)

    def write(self, key: str, data: bytes) -> None:
        """Replace a file or object."""
        if self.remote is not None:
            self.remote._objects.put(key, data)
        else:
            (self.local.folder / key).write_bytes(data)

    def load(self, name: CheckpointName, into: Path) -> Path:
        return self.local.path(name) if self.remote is None else self.remote.download(name, into)


@pytest.fixture(params=["folder", *REMOTE])
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    if request.param != "s3":
        return Rig(tmp_path, (tmp_path / "a #store%20").as_uri() if request.param == "file" else None)
    server = request.getfixturevalue("s3")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return Rig(tmp_path, f"{server.url}/contract/{tmp_path.parent.name}")


def test_a_store_without_checkpoints_is_empty_and_reading_it_creates_nothing(rig: Rig, tmp_path: Path) -> None:
    store = rig.store
    assert (store.names(), store.line(), store.candidates(), store.attempts(), store.scores()) == ([], [], [], {}, {})
    with pytest.raises(CheckpointNotFound, match=r"step-1\.a1"):
        store.manifest(CheckpointName(1, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_returns_byte_for_byte(rig: Rig, tmp_path: Path) -> None:
    saved = rig.save(5, tensors=5_500, state=300, empty=0, exact=2_000)
    assert rig.store.manifest(saved.name) == saved
    path, original = rig.load(saved.name, tmp_path / "into"), rig.local.path(saved.name)
    verify(path, saved)
    assert all((path / file).read_bytes() == (original / file).read_bytes() for file in [*saved.files, "manifest.json"])
    assert rig.load(saved.name, tmp_path / "into") == path  # it stays as it is


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{}", "own hash"),
        (b"", "not a manifest"),
        ("changed", "own hash"),
        ("of another name", r"step-5\.a1"),
    ],
)
def test_a_changed_manifest_is_damage_and_the_line_is_as_before(rig: Rig, content: bytes | str, problem: str) -> None:
    older, newer = rig.save(5), rig.save(6)
    rig.note({1: AttemptNote(1, None)})
    if content == "changed":
        content = encode_manifest(newer).replace(b'"global_step":6', b'"global_step":7')
    rig.write("step-6.a1/manifest.json", encode_manifest(older) if isinstance(content, str) else content)
    with pytest.raises(CheckpointDamaged, match=problem):
        rig.store.manifest(newer.name)
    assert rig.store.line() == [newer.name, older.name]
    unread: list[str] = []
    assert list(rig.store.scores(None, lambda name, error: unread.append(name))) == [older.name]
    assert unread == ["step-6.a1"]


def test_a_manifest_of_a_later_version_is_too_new(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = rig.save(5)
    monkeypatch.setattr("events.checkpoint.manifest.FORMAT", 0)
    with pytest.raises(CheckpointTooNew):
        rig.store.manifest(saved.name)


def test_without_readable_notes_the_manifests_give_the_line(rig: Rig) -> None:
    for step in (10, 20, 30):
        rig.save(step)
    rig.save(25, 2, parent="step-20.a1")
    rig.write("attempt-2.json", b"{")
    assert rig.store.attempts() == {}
    assert list(map(str, rig.store.line())) == ["step-25.a2", "step-20.a1", "step-10.a1"]
    assert list(map(str, rig.store.candidates()))[-1] == "step-30.a1"
    rig.write("step-25.a2/manifest.json", b"{}")
    assert list(map(str, rig.store.line())) == ["step-25.a2"]


@pytest.mark.parametrize("rig", REMOTE, indirect=True)
def test_a_reader_beside_uploads_and_removals_sees_complete_checkpoints_only(rig: Rig, tmp_path: Path) -> None:
    """A listed checkpoint can be downloaded, or was removed meanwhile, which is `CheckpointNotFound`."""
    assert rig.remote is not None
    manifests = [make(rig.local.folder, step) for step in (1, 2, 3)]
    stop, errors, loaded = threading.Event(), [], []

    def read() -> None:
        reader, count = RemoteStore(rig.remote.url), 0  # type: ignore[union-attr]
        while not stop.is_set():
            for name in reader.names():
                count += 1
                try:
                    verify(reader.download(name, tmp_path / f"read{count}"), manifests[name.step - 1])
                    loaded.append(name)
                except CheckpointNotFound:
                    pass
                except BaseException as error:
                    errors.append(error)
                    return

    thread = threading.Thread(target=read)
    thread.start()
    rounds = 0
    while (len(loaded) < 5 or rounds < 5) and not errors:
        rounds += 1
        for manifest in manifests:
            assert put(rig.remote, rig.local.folder, manifest)
        for manifest in manifests:
            rig.remote.remove(manifest.name)
    stop.set()
    thread.join()
    assert not errors, errors
    assert rig.remote._objects.sizes() == {}


class Attempts(RuleBasedStateMachine):
    """Attempts at one run in a store. The model is a dict of its checkpoints, and the ancestry of the newest one."""

    url: ClassVar[str | None]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.rig = Rig(self.folder, self.url if self.url != "file" else (self.folder / "there").as_uri())
        self.saved: dict[CheckpointName, Manifest] = {}
        self.ancestry: dict[CheckpointName, list[CheckpointName]] = {}
        self.chain: list[CheckpointName] = []
        self.notes: dict[int, AttemptNote] = {}
        self.start(None)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @rule(index=st.none() | st.integers(0, 9))
    def start(self, index: int | None) -> None:
        """Start an attempt: a new run, or from any checkpoint."""
        names = sorted(self.saved)
        parent = names[index % len(names)] if names and index is not None else None
        number = len(self.notes) + 1
        self.notes[number] = AttemptNote(number, str(parent) if parent is not None else None)
        self.rig.note(self.notes)
        self.chain = list(self.ancestry[parent]) if parent is not None else []

    @rule(steps=st.integers(1, 3), metric=st.none() | st.sampled_from([0.1, 0.2]))
    def save(self, steps: int, metric: float | None) -> None:
        step = self.chain[-1].step + steps if self.chain else steps
        manifest = self.rig.save(
            step, len(self.notes), parent=self.notes[len(self.notes)].parent, metric=metric, state=9
        )
        self.saved[manifest.name] = manifest
        self.chain.append(manifest.name)
        self.ancestry[manifest.name] = list(self.chain)

    @precondition(lambda self: self.saved)
    @rule(index=st.integers(0, 9))
    def remove(self, index: int) -> None:
        name = sorted(self.saved)[index % len(self.saved)]
        self.rig.remove(name)
        del self.saved[name]

    @invariant()
    def the_store_holds_the_model(self) -> None:
        store, line = self.rig.store, [name for name in reversed(self.chain) if name in self.saved]
        assert store.names() == sorted(self.saved)
        assert {name: store.manifest(name) for name in store.names()} == self.saved
        assert store.attempts() == self.notes
        assert store.line() == line
        others = [name for name in sorted(self.saved, reverse=True) if name not in line]
        assert store.candidates() == ([*line, *others] if line else [])
        metrics = {name: self.saved[name].metric for name in line}
        assert store.scores() == {name: metric for name, metric in metrics.items() if metric is not None}


@pytest.mark.timeout(120)
def test_names_manifests_line_and_scores_follow_every_attempt(rig: Rig, request: pytest.FixtureRequest) -> None:
    kind = request.node.callspec.params["rig"]
    Attempts.url = None if kind == "folder" else "file" if kind == "file" else rig.remote.url  # type: ignore[union-attr]
    own = settings(max_examples=EXAMPLES[kind], stateful_step_count=12, deadline=None, database=None)
    run_state_machine_as_test(Attempts, settings=own)
