"""Checkpoints in a remote store: visible only when whole, never mixed, and no secret in any message.

Here against ``file://`` and against servers that answer nothing, or nonsense; against real ones in `tests/faults`.
"""

from __future__ import annotations

import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events.checkpoint import disk, parallel
from events.checkpoint.files import read_manifest, verify
from events.checkpoint.lineage import AttemptNote
from events.checkpoint.manifest import CheckpointName, FileEntry, Manifest, Metric, encode_manifest
from events.checkpoint.objects import Limits, Objects, parse_url, run_url
from events.checkpoint.parallel import in_order
from events.checkpoint.remote import RemoteStore
from events.checkpoint.remote_layout import PARTS_NAME, encode_parts, parts_for, parts_of
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointDamaged, CheckpointNotFound, CheckpointTooNew, UploadError
from trainer.cli.sources import RemoteSource

ROOT = Path(__file__).parents[2]
PART = 1_000
IMPATIENT = Limits(connect_s=2.0, request_s=2.0, retries=0)
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIASECRETSECRET0001",
    "AWS_SECRET_ACCESS_KEY": "s3cr3t/with+slashes/and=more0123456789ab",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzESESSIONSECRETabcdef0123456789",
    "AWS_REGION": "eu-central-1",
}


def make(folder: Path, step: int, attempt: int = 1, *, parent: str | None = None, **files: int) -> Manifest:
    """A checkpoint of random bytes; files are given by their sizes."""
    store = CheckpointStore(folder)
    name = CheckpointName(step, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = store.begin(name)
    noise = random.Random(f"{name} {files}")
    entries = {}
    for stem, nbytes in (files or {"tensors": 5_500, "state": 300}).items():
        entries[f"{stem}.bin"] = FileEntry(*disk.write_parts(temporary, f"{stem}.bin", [noise.randbytes(nbytes)]))
    manifest = Manifest(
        run_id="run",
        attempt=attempt,
        global_step=step,
        epoch=0,
        seq=step,
        time=float(step),
        parent=parent,
        reasons=["steps"],
        metric=Metric("val_loss", 1.0),
        files=entries,
    )
    store.commit(manifest)
    return manifest


def put(remote: RemoteStore, folder: Path, manifest: Manifest, **options: Any) -> bool:
    call = {"part_bytes": PART, "progress": lambda done, total: None, "cancelled": lambda: False} | options
    return remote.upload(folder / str(manifest.name), manifest, **call)


def keys(folder: Path) -> list[str]:
    """All files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder behind the remote store."""
    return tmp_path / "a #store%20"


@pytest.fixture
def remote(there: Path) -> RemoteStore:
    return RemoteStore(there.as_uri())


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of all objects that are written, in order."""
    written: list[str] = []
    real = Objects.put

    def spy(self: Objects, key: str, data: bytes) -> None:
        written.append(key)
        real(self, key, data)

    monkeypatch.setattr(Objects, "put", spy)
    return written


# ------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://key:SECRET@bucket/prefix", "a user, a password or a port"),
        ("s3://SECRET@bucket/prefix", "a user, a password or a port"),
        ("s3://key:SECRET/more@bucket/prefix", "a user, a password or a port"),
        ("gs://key:SECRET@bucket", "a user, a password or a port"),
        ("az://container@SECRET.blob.core.windows.net/x", "a user, a password or a port"),
        ("az://container/x?sv=2020&sig=SECRET", "a query or a fragment"),
        ("s3://bucket/x#SECRET", "a query or a fragment"),
        ("https://SECRET.blob.core.windows.net/c?sig=SECRET", "https:// is not a URL"),
        ("SECRET:xyz", "this text is not a URL"),
        ("SECRET/bucket", "this text is not a URL"),
        ("memory:///SECRET", "memory:// is not a URL"),
        ("s3:///SECRET", "has no bucket"),
        ("az:///SECRET", "has no container"),
        ("file://host/SECRET", "has no absolute folder"),
        ("file://", "has no absolute folder"),
        ("s3://bucket/SECRET//x", "empty or special segments"),
        ("s3://bucket/../SECRET", "empty or special segments"),
        ("s3://bucket/%2e%2e/SECRET", "empty or special segments"),
        ("s3://bucket/SECRET%0A", "empty or special segments"),
    ],
)
def test_an_address_that_is_none_is_refused_and_not_repeated(url: str, why: str) -> None:
    """It may hold a password, and messages are logged, published and sent."""
    with pytest.raises(UploadError, match=why) as caught:
        RemoteStore(url)
    told = "".join(traceback.format_exception(caught.value))
    assert "give s3://bucket/prefix" in told
    assert "SECRET" not in str(caught.value)


def test_the_name_of_a_run_stays_one_segment() -> None:
    """Whatever it is called: no run lies within another."""
    address = parse_url(run_url("s3://bucket/my%20prefix/", "a/b #1?%"))
    assert (address.scheme, address.bucket) == ("s3", "bucket")
    assert run_url("s3://bucket", "a/b").endswith("/a%2Fb")
    assert parse_url(run_url("s3://bucket/p", "20260131-235959-a1b2c3")).prefix == "p/20260131-235959-a1b2c3"


def test_without_obstore_it_says_what_to_install(remote: RemoteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is optional."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UploadError, match=r"pip install 'stagecast\[upload\]'"):
        remote.check()


# ---------------------------------------------------------------------------------------- secrets and outages


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as S3 does to a wrong signature, which it quotes; or whatever it is told to."""

    answer: tuple[int, str] = (0, "")
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = self.answer[1].encode()
        self.send_response(self.answer[0])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_DELETE = do_POST = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Refusing]]:
    """A server that refuses, as the endpoint of S3 with `SECRETS` in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        monkeypatch.setenv("AWS_ENDPOINT", f"http://user:{SECRETS['AWS_SESSION_TOKEN']}@127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield Refusing
        server.shutdown()
        thread.join()


def calls_of(remote: RemoteStore, local: Path, manifest: Manifest) -> list[Callable[[], object]]:
    name = CheckpointName(1, 1)
    return [
        remote.check,
        remote.names,
        remote.line,
        remote.reap,
        lambda: remote.manifest(name),
        lambda: remote.remove(name),
        lambda: remote.note([AttemptNote(1, None)]),
        lambda: remote.download(name, local / "into"),
        lambda: put(remote, local, manifest),
        lambda: remote._objects.put("key", b"data"),
        lambda: remote._objects.delete("key"),
    ]


def all_texts(error: BaseException) -> list[str]:
    """What a logger could make of an error: its traceback, and the errors that hang on it unseen."""
    texts = ["".join(traceback.format_exception(error))]
    context = error.__context__
    while context is not None:
        texts.append(repr(context))
        context = context.__context__
    return texts


SIGNATURE = (
    "<?xml version='1.0'?><Error><Code>SignatureDoesNotMatch</Code><Message>The request signature we calculated does"
    " not match</Message><AWSAccessKeyId>{AWS_ACCESS_KEY_ID}</AWSAccessKeyId><StringToSign>AWS4-HMAC-SHA256"
    " x-amz-security-token:{AWS_SESSION_TOKEN}</StringToSign><Key>{AWS_SECRET_ACCESS_KEY}</Key></Error>"
)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (403, SIGNATURE, r"access was denied \(403 Forbidden, SignatureDoesNotMatch\); check the credentials"),
        (401, SIGNATURE, r"access was denied \(401 Unauthorized"),
        (500, SIGNATURE, r"the store failed \(500 Internal Server Error"),
        (400, SIGNATURE, r"the store refused \(400 Bad Request"),
        (404, "<Error><Code>NoSuchBucket</Code><Key>{AWS_ACCESS_KEY_ID}</Key></Error>", "the bucket does not exist"),
        (200, "{AWS_SECRET_ACCESS_KEY} {AWS_SESSION_TOKEN}", None),
    ],
)
def test_no_secret_is_shown_when_the_store_refuses(
    refusing: type[Refusing], local: Path, status: int, body: str, told: str | None
) -> None:
    """Servers quote what was signed, and with what: not in our messages, their causes or their contexts."""
    manifest = make(local, 1)
    refusing.answer = (status, body.format(**SECRETS))
    remote = RemoteStore("s3://bucket/prefix/run", IMPATIENT)
    errors: list[Exception] = []
    for call in calls_of(remote, local, manifest):
        try:
            call()
        except (UploadError, CheckpointDamaged) as error:
            errors.append(error)
    texts = [text for error in errors for text in all_texts(error)]
    assert len(errors) > 3
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        assert not [text for text in texts if SECRETS[name] in text]
    if told is not None:
        assert all(isinstance(error, UploadError) and remote.url in str(error) for error in errors)
        with pytest.raises(UploadError, match=told):
            remote.check()


def test_a_store_that_nobody_listens_at_is_told_in_time_and_without_secrets(
    refusing: type[Refusing], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused connections and unknown names are errors after a bounded time, with what to look at."""
    manifest = make(local, 1)
    for endpoint, told in [
        ("http://127.0.0.1:1", "the connection was refused; is the network up, and AWS_ENDPOINT right"),
        ("http://nobody.invalid", "its address is not known; is the network up"),
    ]:
        monkeypatch.setenv("AWS_ENDPOINT", endpoint)
        remote = RemoteStore("s3://bucket/prefix/run", IMPATIENT)
        for call in calls_of(remote, local, manifest):
            with pytest.raises(UploadError, match=told) as caught:
                call()
            assert not [value for value in SECRETS.values() if value in repr(caught.value)]
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(UploadError, match="not encrypted; use https, or allow that with AWS_ALLOW_HTTP=true"):
        RemoteStore("s3://bucket/prefix/run", IMPATIENT).check()


@pytest.mark.parametrize(
    ("url", "environment", "told"),
    [
        (
            "az://container/run",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0LXNlY3JldC1zZWNyZXQ=",
                "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:1",
                "AZURE_ALLOW_HTTP": "true",
            },
            "and AZURE_STORAGE_ENDPOINT right",
        ),
        (
            "az://container/run",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_SAS_TOKEN": "sv=2022-11-02&sp=rwdl&sig=c2VjcmV0LXNlY3JldC1zZWNyZXQ%3D",
                "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:1",
                "AZURE_ALLOW_HTTP": "true",
            },
            "and AZURE_STORAGE_ENDPOINT right",
        ),
        ("az://container/run", {}, "no account is named; set AZURE_STORAGE_ACCOUNT_NAME"),
        (
            "gs://bucket/run",
            {
                "GOOGLE_BASE_URL": "http://127.0.0.1:1",
                "GOOGLE_BEARER_TOKEN": "c2VjcmV0LXNlY3JldC1zZWNyZXQ",
                "GOOGLE_ALLOW_HTTP": "true",
            },
            "and GOOGLE_BASE_URL right",
        ),
    ],
)
def test_other_stores_name_their_own_variables(
    url: str, environment: dict[str, str], told: str, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What to look at is what obstore reads for that store; signatures in addresses are not shown."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    manifest = make(local, 1)
    remote = RemoteStore(url, IMPATIENT)
    for call in calls_of(remote, local, manifest)[:3]:
        with pytest.raises(UploadError, match=told) as caught:
            call()
        assert "c2VjcmV0" not in "".join(all_texts(caught.value))
        assert url in str(caught.value)


def test_an_unknown_error_shows_nothing_that_looks_like_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what nobody has foreseen, the first line remains, without addresses, keys and what the environment holds."""
    from events.checkpoint.problems import explain

    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "hunter2!")
    text = "odd hunter2! at https://user:pw@host/x?sig=abc with AbCdEf0123456789+/AbCdEf==\n\nDebug source: hunter3"
    told = str(explain(ValueError(text), "write", "az://c/x", "az"))
    assert told == "cannot write az://c/x: ValueError: odd ... at ... with ...; check the URL, and the environment"


# -------------------------------------------------------------------------------------------------- uploading


def test_a_checkpoint_comes_back_as_it_was(remote: RemoteStore, there: Path, local: Path, tmp_path: Path) -> None:
    """Every file byte for byte, in parts that `cat` puts together, with the very same manifest."""
    manifest = make(local, 5, tensors=5_500, state=300, empty=0, exact=2_000, single=PART)
    seen: list[tuple[int, int]] = []
    assert put(remote, local, manifest, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (manifest.nbytes, manifest.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert remote.names() == [manifest.name]
    assert remote.manifest(manifest.name) == manifest
    parts = sorted((there / "step-5.a1").glob("tensors.bin.*-of-*"))
    assert [part.stat().st_size for part in parts] == [PART] * 5 + [500]
    original = local / "step-5.a1"
    assert b"".join(part.read_bytes() for part in parts) == (original / "tensors.bin").read_bytes()
    assert (there / "step-5.a1/manifest.json").read_bytes() == (original / "manifest.json").read_bytes()

    path = remote.download(manifest.name, tmp_path / "new" / "checkpoints")
    verify(path, read_manifest(path))
    assert keys(path) == sorted([*keys(original), "uploaded"])
    assert all((path / key).read_bytes() == (original / key).read_bytes() for key in keys(original))
    upload = CheckpointStore(path.parent).upload_of(manifest.name)
    assert upload is not None
    assert upload.url == f"{remote.url}/step-5.a1"
    assert remote.download(manifest.name, path.parent) == path  # it stays as it is


def test_parts_sort_as_they_follow_each_other() -> None:
    """Also when there are more of them than five digits can count."""
    parts = parts_of("file", 100_001, 1)
    assert sorted(part.key for part in parts) == [part.key for part in parts]
    assert parts[-1].key == "file.100000-of-100001"
    assert parts_of("file", 0, 10) == [("file", 0)]
    assert parts_of("file", 10, 10) == [("file", 10)]
    assert parts_of("file", 11, 10) == [("file.00000-of-00002", 10), ("file.00001-of-00002", 1)]


def test_an_upload_goes_on_where_it_was(remote: RemoteStore, local: Path, puts: list[str]) -> None:
    """What is there already is not sent again; the manifest comes last, whatever came before it."""
    manifest = make(local, 5)
    asked = iter([False] * 3 + [True] * 9)
    assert not put(remote, local, manifest, cancelled=lambda: next(asked))
    assert remote.names() == []
    first = [key for key in puts if key != f"step-5.a1/{PARTS_NAME}"]
    assert len(first) == 3
    puts.clear()
    seen: list[int] = []
    assert put(remote, local, manifest, progress=lambda done, total: seen.append(done))
    assert seen[-1] == manifest.nbytes  # what was there counts as done
    assert puts[-1] == "step-5.a1/manifest.json"
    assert not set(puts) & set(first)
    assert len(puts) == 6 + 1 - 3 + 1
    puts.clear()
    assert put(remote, local, manifest)  # all is there: nothing is sent
    assert puts == []


def test_an_object_of_the_wrong_size_is_put_again(remote: RemoteStore, there: Path, local: Path) -> None:
    """A store that is no real one may keep half of an object."""
    manifest = make(local, 5)
    asked = iter([False] * 3 + [True] * 9)
    put(remote, local, manifest, cancelled=lambda: next(asked))
    next((there / "step-5.a1").glob("tensors.bin.*")).write_bytes(b"half")
    assert put(remote, local, manifest)
    verify(remote.download(manifest.name, local / "into"), manifest)


@pytest.mark.parametrize("part_bytes", [PART, 700])
def test_what_another_run_of_the_name_has_left_is_never_mixed_in(
    remote: RemoteStore, local: Path, tmp_path: Path, part_bytes: int
) -> None:
    """A run folder that was deleted and begun anew makes checkpoints of the same names and sizes."""
    old, new = make(local, 5), make(tmp_path / "anew", 5, tensors=5_500, state=301)
    asked = iter([False] * 4 + [True] * 9)
    assert not put(remote, local, old, cancelled=lambda: next(asked))
    assert put(remote, tmp_path / "anew", new, part_bytes=part_bytes)
    path = remote.download(new.name, tmp_path / "into")
    verify(path, new)
    sizes = remote._objects.sizes("step-5.a1/")
    expected = [part.key for file, entry in new.files.items() for part in parts_of(file, entry.nbytes, part_bytes)]
    assert set(sizes) == {f"step-5.a1/{key}" for key in [*expected, PARTS_NAME, "manifest.json"]}
    with pytest.raises(UploadError, match=r"step-5.a1 is another checkpoint than the local one"):
        put(remote, local, old)
    verify(remote.download(new.name, tmp_path / "again"), new)


def test_a_local_file_that_was_changed_never_becomes_visible(remote: RemoteStore, local: Path) -> None:
    """Older checkpoints are deleted on the strength of an upload: it must be one that can be loaded."""
    manifest = make(local, 5)
    path = local / "step-5.a1/tensors.bin"
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"x", b"x" + path.read_bytes()[1:]):
        path.write_bytes(data)
        with pytest.raises(CheckpointDamaged, match=r"tensors\.bin"):
            put(remote, local, manifest)
        assert remote.names() == []


def test_parts_that_vanished_meanwhile_keep_it_invisible(
    remote: RemoteStore, there: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that takes this one for dead may have removed them."""
    manifest = make(local, 5)

    def progress(done: int, total: int) -> None:
        if done == total:
            (there / "step-5.a1/state.bin").unlink()

    with pytest.raises(UploadError, match=r"state\.bin was deleted during the upload"):
        put(remote, local, manifest, progress=progress)
    assert remote.names() == []


def test_files_that_are_called_like_parts_are_refused(remote: RemoteStore, local: Path) -> None:
    """Two files would be one object."""
    manifest = make(local, 5, **{"a": 1_500, "a.bin.00000-of-00002": 5})
    renamed = dict(manifest.files)
    renamed["a.bin.00000-of-00002"] = renamed.pop("a.bin.00000-of-00002.bin")
    with pytest.raises(UploadError, match="have the names of other files"):
        put(
            remote,
            local,
            Manifest(**{f: getattr(manifest, f) for f in manifest.__struct_fields__} | {"files": renamed}),
        )


def test_few_parts_are_in_memory_and_several_under_way(
    there: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as `Limits.parallel` says, at the same time and at most."""
    manifest = make(local, 5, tensors=20 * PART)
    lock, met = threading.Lock(), threading.Barrier(3)
    begun, flying, most = 0, 0, 0
    real = Objects.put

    def counted(self: Objects, key: str, data: bytes) -> None:
        nonlocal begun, flying, most
        with lock:
            begun, flying = begun + 1, flying + 1
            most = max(most, flying)
            first = 1 < begun <= 4  # after parts.json
        if first:
            met.wait(30)  # returns only when three are under way
        real(self, key, data)
        with lock:
            flying -= 1

    monkeypatch.setattr(Objects, "put", counted)
    assert put(RemoteStore(there.as_uri(), Limits(parallel=3)), local, manifest)
    assert (begun, flying, most) == (22, 0, 3)


# ------------------------------------------------------------------------------------------ readers and removal


def test_a_reader_beside_uploads_and_removals_never_sees_half_a_checkpoint(
    remote: RemoteStore, local: Path, tmp_path: Path
) -> None:
    """Whatever it lists can be loaded whole, or has been removed meanwhile, which it is told as such."""
    manifests = [make(local, step) for step in (1, 2, 3)]
    stop, errors, loaded = threading.Event(), [], []

    def read() -> None:
        reader = RemoteStore(remote.url)
        count = 0
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
    while (len(loaded) < 20 or rounds < 10) and not errors:
        rounds += 1
        for manifest in manifests:
            assert put(remote, local, manifest)
        for manifest in manifests:
            remote.remove(manifest.name)
    stop.set()
    thread.join()
    assert not errors, errors
    assert remote._objects.sizes() == {}


def test_a_removal_that_is_cut_short_leaves_nothing_visible(
    remote: RemoteStore, there: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest goes first; what is left is reaped, unless it is going to be uploaded."""
    manifest = make(local, 5)
    put(remote, local, manifest)
    real, left = Objects.delete, iter(range(2))

    def failing(self: Objects, key: str) -> None:
        if next(left, None) is None:
            raise UploadError("cut")
        real(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "delete", failing)
        with pytest.raises(UploadError, match="cut"):
            remote.remove(manifest.name)
    assert remote.names() == []
    assert len(keys(there)) > 3
    assert remote.reap(keep={manifest.name}) == []
    assert len(keys(there)) > 3
    assert remote.reap() == [manifest.name]
    assert keys(there) == []
    assert list(there.iterdir()) == []


def test_a_lone_manifest_is_no_checkpoint(remote: RemoteStore, there: Path, local: Path) -> None:
    """A request that hung in the network may write it after everything was removed."""
    manifest = make(local, 5)
    put(remote, local, manifest)
    remote.remove(manifest.name)
    (there / "step-5.a1").mkdir()
    (there / "step-5.a1/manifest.json").write_bytes(encode_manifest(manifest))
    assert remote.names() == []
    assert remote.reap() == [manifest.name]
    assert keys(there) == []


@pytest.mark.parametrize("lost", ["parts.json", "tensors.bin.00002-of-00006", "manifest.json"])
def test_one_that_is_visible_but_not_whole_is_made_whole_by_its_upload(
    remote: RemoteStore, there: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """A manifest alone proves nothing to the uploader, on whose word older checkpoints are deleted."""
    manifest = make(local, 5)
    put(remote, local, manifest)
    path = there / "step-5.a1" / lost
    if lost == "manifest.json":
        path.write_bytes(b"{}")  # nobody can read it
    else:
        path.unlink()
    asked: list[list[CheckpointName]] = []

    def cancelled() -> bool:
        asked.append(remote.names())
        return False

    assert put(remote, local, manifest, cancelled=cancelled)
    assert not any(asked)  # no reader meets it meanwhile
    verify(remote.download(manifest.name, tmp_path / "into"), manifest)


def test_what_a_download_finds_damaged_is_never_put_in_place(
    remote: RemoteStore, there: Path, local: Path, tmp_path: Path
) -> None:
    """Cut, changed, missing: named, and nothing is left that could be taken for a checkpoint."""
    manifest = make(local, 5)
    put(remote, local, manifest)
    part = there / "step-5.a1/tensors.bin.00002-of-00006"
    good = part.read_bytes()
    into = tmp_path / "into"
    for data, why in [(good[:-1], "999 bytes instead of 1,000"), (b"x" + good[1:], "holds other bytes")]:
        part.write_bytes(data)
        with pytest.raises(CheckpointDamaged, match=why):
            remote.download(manifest.name, into)
        assert list(into.iterdir()) == []
    part.unlink()
    with pytest.raises(CheckpointDamaged, match=r"00002-of-00006 is missing"):
        remote.download(manifest.name, into)
    for bad in (b'{"part_bytes":0,"manifest_xxh3_128":""}', b"{"):
        (there / "step-5.a1/parts.json").write_bytes(bad)
        with pytest.raises(CheckpointDamaged, match=r"parts\.json was changed"):
            remote.download(manifest.name, into)
    (there / "step-5.a1/manifest.json").write_bytes(b"{}")
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
        remote.download(manifest.name, into)
    with pytest.raises(CheckpointNotFound, match=r"there is no checkpoint file://.*step-6\.a1"):
        remote.download(CheckpointName(6, 1), into)
    assert put(remote, local, manifest)  # nobody can read it: it is replaced
    verify(remote.download(manifest.name, into), manifest)


def test_a_manifest_of_another_name_is_damage(remote: RemoteStore, there: Path, local: Path) -> None:
    """Somebody has copied or renamed it."""
    put(remote, local, make(local, 5))
    (there / "step-5.a1").rename(there / "step-6.a1")
    with pytest.raises(CheckpointDamaged, match=r"is that of step-5\.a1"):
        remote.manifest(CheckpointName(6, 1))


def test_one_of_a_later_version_is_not_overwritten(
    remote: RemoteStore, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is whole, though we cannot read it."""
    manifest = make(local, 5)
    put(remote, local, manifest)
    monkeypatch.setattr("events.checkpoint.manifest.FORMAT", 0)
    with pytest.raises(CheckpointTooNew):
        remote.manifest(manifest.name)
    with pytest.raises(UploadError, match="another checkpoint"):
        put(remote, local, manifest)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_what_a_killed_process_has_staged_is_reaped(remote: RemoteStore, there: Path, local: Path) -> None:
    """A file is written beside the object and renamed; of that, no listing shows anything."""
    code = f"""
import os, signal
from events.safe_files import replace_below
def chunks():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)
replace_below({str(there)!r}, "step-5.a1/tensors.bin", chunks())
"""
    (there / "step-5.a1").mkdir(parents=True)
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50, check=False)
    assert killed.returncode == -signal.SIGKILL
    (key,) = keys(there)
    assert key.startswith("step-5.a1/.tensors.bin.")
    assert key.endswith(".tmp")
    assert remote._objects.sizes() == {}
    remote.reap()
    assert list(there.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="links are POSIX")
@pytest.mark.parametrize("what", ["folder", "object"])
def test_an_object_is_not_written_through_a_link_that_appears_during_an_upload(
    remote: RemoteStore, there: Path, local: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user of the folder puts it there after the first part; what it leads to stays as it is."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "file").write_bytes(b"private")
    write, manifest = Objects._call, make(local, 5)

    def write_after_link(self: Objects, action: str, key: str, function: Any, **options: Any) -> Any:
        if action == "write" and key.endswith("manifest.json"):
            if what == "folder":
                (there / "step-5.a1").rename(there / "away")
                (there / "step-5.a1").symlink_to(private)
            else:
                (there / key).symlink_to(private / "file")
        return write(self, action, key, function, **options)

    monkeypatch.setattr(Objects, "_call", write_after_link)
    if what == "folder":
        with pytest.raises(UploadError, match="symbolic link"):
            put(remote, local, manifest)
    else:
        put(remote, local, manifest)
        assert remote.names() == [manifest.name]
    assert [(path.name, path.read_bytes()) for path in private.iterdir()] == [("file", b"private")]


# --------------------------------------------------------------------------------------------------- the line


def test_the_line_is_followed_as_on_disk(remote: RemoteStore, local: Path) -> None:
    """A run may be continued from the store alone: the same candidates in the same order."""
    store = CheckpointStore(local)
    local.mkdir()
    store.prepare(AttemptNote(1, None))
    manifests = [make(local, step) for step in (10, 20, 30)]
    store.prepare(AttemptNote(2, "step-20.a1"))
    manifests.append(make(local, 25, 2, parent="step-20.a1"))
    store.prepare(AttemptNote(3, "step-25.a2"))
    assert remote.names() == remote.line() == list(remote.candidates()) == []
    assert remote.last_attempt == 0
    for manifest in manifests:
        put(remote, local, manifest)
    without_notes = [str(name) for name in remote.line()]
    assert without_notes == ["step-25.a2", "step-20.a1", "step-10.a1"]  # the manifests say it too
    assert remote.last_attempt == 2
    remote.note(store.attempts().values())
    assert remote.last_attempt == 3
    assert remote.names() == store.names()
    assert remote.line() == store.line()
    assert list(remote.candidates()) == list(store.candidates())
    assert [str(name) for name in remote.candidates()][-1] == "step-30.a1"


def test_an_outage_is_not_taken_for_the_beginning_of_the_line(
    remote: RemoteStore, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest that cannot be read for now must not make the run begin elsewhere."""
    put(remote, local, make(local, 10))
    put(remote, local, make(local, 25, 2, parent="step-10.a1"))

    def outage(self: RemoteStore, name: CheckpointName) -> Manifest:
        raise UploadError("out")

    monkeypatch.setattr(RemoteStore, "manifest", outage)
    with pytest.raises(UploadError, match="out"):
        remote.line()


def test_notes_of_an_earlier_run_of_the_name_are_forgotten(remote: RemoteStore, there: Path) -> None:
    """Or the line would be that of a run which is no more."""
    remote.note([AttemptNote(number, None) for number in (1, 2, 3)])
    remote.note([AttemptNote(1, "step-5.a0")])
    assert keys(there) == ["attempt-1.json"]
    (there / "attempt-2.json").write_text("{")  # damaged ones say nothing
    assert remote.last_attempt == 1


def test_a_reader_leaves_nothing_behind(remote: RemoteStore, there: Path, tmp_path: Path) -> None:
    """Asking a store that does not exist makes none; only `check`, before an upload, does."""
    assert remote.names() == []
    with pytest.raises(CheckpointNotFound):
        remote.download(CheckpointName(1, 1), tmp_path / "into")
    assert not there.exists()
    remote.check()
    assert there.is_dir()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UploadError, match=r"cannot use file://.*(exists|not a directory)"):
        RemoteStore(file.as_uri()).check()


# ------------------------------------------------------------------------------------------------ calls in order


def test_a_call_that_fails_ends_the_others_in_order() -> None:
    """No further one begins, and none is under way when the error arrives."""
    begun: list[int] = []
    finished: list[int] = []
    go = threading.Event()

    def call(number: int) -> int:
        begun.append(number)
        if number == 1:
            go.set()
            raise ValueError("one")
        go.wait(30)
        finished.append(number)
        return number

    results = []
    with pytest.raises(ValueError, match="one"):
        for result in in_order((lambda number=number: call(number) for number in range(100)), 3, "test"):
            results.append(result)
    assert results == [0]
    assert len(begun) <= 4
    assert sorted(finished) == sorted(set(begun) - {1})


def test_a_loop_that_ends_early_leaves_no_thread_behind() -> None:
    """Closing waits for what is under way."""
    with closing(in_order((lambda: 1 for _ in range(100)), 3, "left-behind")) as results:
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name == "left-behind"]


def test_without_threads_calls_are_made_by_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has no more threads still uploads."""

    def no_more(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(parallel.threading.Thread, "start", no_more)
    assert list(in_order((lambda number=number: number for number in range(5)), 3, "test")) == list(range(5))


# ---------------------------------------------------------------------------------------- what somebody else wrote


def rewrite(place: Path, manifest: Manifest, part_bytes: int) -> None:
    """Put a manifest, and parts that go with it, in place of a checkpoint's own."""
    folder = place / str(manifest.name)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    (folder / "parts.json").write_bytes(encode_parts(parts_for(manifest, part_bytes)))


@pytest.mark.parametrize("part_bytes", [1, 2**20, 2**62])
def test_a_manifest_that_claims_more_than_is_there_is_damaged_at_once(tmp_path: Path, part_bytes: int) -> None:
    """Neither its parts are listed nor its bytes asked for: they would fill the memory and the disk."""
    manifest = make(tmp_path / "local", 5)
    remote = RemoteStore((tmp_path / "store").as_uri())
    put(remote, tmp_path / "local", manifest)
    huge = {name: msgspec.structs.replace(entry, nbytes=2**61) for name, entry in manifest.files.items()}
    rewrite(tmp_path / "store", msgspec.structs.replace(manifest, files=huge), part_bytes)
    with pytest.raises(CheckpointDamaged):
        remote.download(manifest.name, tmp_path / "into")
    assert not any((tmp_path / "into").iterdir())
    source = RemoteSource((tmp_path / "store").as_uri())
    for read in (source.check, source.verify):
        with pytest.raises(CheckpointDamaged):
            read(source.manifest(manifest.name))
    with pytest.raises(CheckpointDamaged):
        source.read(source.manifest(manifest.name), next(iter(huge)))


@pytest.mark.skipif(os.name == "nt", reason="links and FIFOs are POSIX")
@pytest.mark.parametrize("kind", ["link", "FIFO", "folder", "sparse"])
@pytest.mark.parametrize("file", ["manifest.json", "parts.json", "state.bin"])
def test_an_object_that_is_not_a_small_regular_file_is_damage(tmp_path: Path, file: str, kind: str) -> None:
    """It is neither waited for, nor followed, nor read into memory; the checkpoint beside it is downloaded."""
    older, manifest = make(tmp_path / "local", 5), make(tmp_path / "local", 6)
    remote = RemoteStore((tmp_path / "store").as_uri())
    put(remote, tmp_path / "local", older)
    put(remote, tmp_path / "local", manifest)
    path = tmp_path / "store" / str(manifest.name) / file
    secret = tmp_path / "secret"
    path.rename(secret)
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as sparse:
            sparse.truncate(40 * 2**30)
    with pytest.raises((CheckpointDamaged, CheckpointNotFound)):
        remote.download(manifest.name, tmp_path / "into")
    verify(remote.download(older.name, tmp_path / "into"), older)


@pytest.mark.skipif(os.name == "nt", reason="links are POSIX")
def test_a_folder_of_objects_that_is_a_link_is_neither_written_nor_emptied(tmp_path: Path) -> None:
    """The error names it."""
    manifest = make(tmp_path / "local", 5)
    private = tmp_path / "private"
    private.mkdir()
    (private / "manifest.json").write_bytes(b"mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / str(manifest.name)).symlink_to(private)
    remote = RemoteStore((tmp_path / "store").as_uri())
    for act in (lambda: put(remote, tmp_path / "local", manifest), lambda: remote.remove(manifest.name)):
        with pytest.raises((UploadError, CheckpointDamaged), match="symbolic link"):
            act()
    remote.reap()
    assert remote.names() == []
    assert {path.name: path.read_bytes() for path in private.iterdir()} == {"manifest.json": b"mine"}


def test_a_local_checkpoint_that_claims_more_than_it_has_is_not_planned(tmp_path: Path) -> None:
    """Its parts would fill the memory."""
    manifest = make(tmp_path / "local", 5)
    huge = {name: msgspec.structs.replace(entry, nbytes=2**61) for name, entry in manifest.files.items()}
    remote = RemoteStore((tmp_path / "store").as_uri())
    with pytest.raises(CheckpointDamaged, match="would consist of"):
        put(remote, tmp_path / "local", msgspec.structs.replace(manifest, files=huge))
