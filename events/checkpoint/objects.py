"""Objects in a remote store, by obstore: whole ones are put, read, listed and deleted. No secret leaves this module.

Credentials and endpoints come from the environment, as obstore reads it:

======= ==============================================================================================================
s3://   ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``; without keys those of
        the machine or the container. For other servers than Amazon's: ``AWS_ENDPOINT`` (or ``AWS_ENDPOINT_URL``).
gs://   ``GOOGLE_APPLICATION_CREDENTIALS``, ``GOOGLE_SERVICE_ACCOUNT`` (paths of files), or those of the machine.
az://   ``AZURE_STORAGE_ACCOUNT_NAME`` with ``AZURE_STORAGE_ACCOUNT_KEY``, ``AZURE_STORAGE_SAS_TOKEN`` or
        ``AZURE_STORAGE_CLIENT_ID``, ``..._CLIENT_SECRET``, ``..._TENANT_ID``; ``AZURE_STORAGE_ENDPOINT``.
======= ==============================================================================================================

and for all of them, with ``AWS_``, ``GOOGLE_`` or ``AZURE_`` before it, the options of the connection in
`_CLIENT_OPTIONS` (``AWS_ALLOW_HTTP=true``). Nothing else is read: no ``~/.aws``.

Only obstore's plain calls are used. They wait, without the interpreter lock, on threads of our own: its asynchronous
ones need asyncio.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import re
import stat
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from events.checkpoint import disk
from events.checkpoint.problems import explain, lacks_container
from events.errors import CheckpointDamaged, UploadError
from events.safe_files import (
    UnsafeFile,
    list_below,
    make_folder_below,
    open_below,
    read_below,
    replace_below,
    unlink_below,
)

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az", "file")
_PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    "connect_timeout",
    "timeout",
)
_BUCKET = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]{0,254}", re.ASCII)
# What a process that was killed has left of a file it was putting (`events.safe_files.replace_below`).
_STAGED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.ASCII | re.DOTALL)
_OURS = re.compile(r"step-[0-9]|attempt-[0-9]", re.ASCII)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long a remote store is waited for. What cannot be reached is an `UploadError` after ``connect_s``, or after
    ``retry_s`` and one more request."""

    connect_s: float = 5.0
    request_s: float = 30.0
    """How long one request may take, and in addition..."""
    slowest_bytes_per_s: float = 64 * 2**10
    """...its bytes at this speed: a connection that is even slower takes smaller parts."""
    retries: int = 3
    """How often a request is made again at once, if it failed for a reason that may pass..."""
    retry_s: float = 20.0
    """...but none is begun later than this."""
    parallel: int = 4
    """Requests at a time: so many parts may be in memory."""


class Address(msgspec.Struct, frozen=True):
    """Where objects are."""

    url: str
    scheme: str
    bucket: str
    """Empty for ``file``."""
    prefix: str
    """Without slashes around it; of ``file``, the folder's path."""


def run_url(base: str, run_id: str) -> str:
    """Where the checkpoints of a run are, below what `Checkpoints.upload` names."""
    return f"{base.rstrip('/')}/{urllib.parse.quote(run_id, safe='')}"


def parse_url(url: str) -> Address:
    """Take a URL apart.

    Raises:
        UploadError: It is no URL of a store, or holds what may be a secret: then no part of it is in the message.
    """
    scheme, separator, rest = url.partition("://")
    known = "give s3://bucket/prefix, gs://bucket/prefix, az://container/prefix or file:///folder"
    if not separator or scheme not in SCHEMES:
        shown = f"{scheme}://" if separator and re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "this"
        raise UploadError(f"checkpoints cannot be uploaded to {shown}: {known}")
    bucket, _, path = rest.partition("/")
    if "?" in rest or "#" in rest:
        raise UploadError(
            f"the {scheme}:// URL for checkpoints has a query or a fragment, which may be a signature: credentials come"
            f" from the environment; {known}"
        )
    if "@" in bucket or ":" in bucket:
        raise UploadError(
            f"the {scheme}:// URL for checkpoints contains a user, a password or a port: credentials and endpoints come"
            f" from the environment; {known}"
        )
    if (bucket not in ("", "localhost") or not path) if scheme == "file" else not _BUCKET.fullmatch(bucket):
        raise UploadError(f"the {scheme}:// URL for checkpoints names no {_container(scheme)}: {known}")
    if scheme == "file":
        return Address(url.rstrip("/"), scheme, "", urllib.request.url2pathname(f"/{path}"))
    prefix = urllib.parse.unquote(path).strip("/")
    if any(segment in ("", ".", "..") or not segment.isprintable() for segment in prefix.split("/") if prefix):
        raise UploadError(f"the {scheme}:// URL for checkpoints has a path with empty or special segments: {known}")
    return Address(url.rstrip("/"), scheme, bucket, prefix)


def _container(scheme: str) -> str:
    return {"az": "container", "file": "absolute folder"}.get(scheme, "bucket")


class Objects:
    """The objects below one URL. Any thread; everything waits for the store.

    Every method may raise `UploadError`: the store cannot be reached, or refuses. It says what to do, and contains
    nothing that the store, or the environment, may want to keep.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        self.address = parse_url(url)
        self.url = self.address.url
        self._limits = limits
        self._clients: dict[int, Any] = {}
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path | None:
        """Where the objects are files."""
        return Path(self.address.prefix) if self.address.scheme == "file" else None

    def check(self) -> None:
        """See whether the store can be reached and listed."""
        if self.folder is not None:
            self._call("use", "", functools.partial(self.folder.mkdir, parents=True, exist_ok=True))
        self._call("list", "", lambda: next(iter(_obstore().list(self._client(0), chunk_size=1)), None))

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write an object as a whole; on stable storage, where it is a file, when this returns."""
        if self.folder is not None:
            self._call("write", key, lambda: self._write(key, data))
            return
        # One plain request. A multipart upload would be left behind, invisible and paid for, by a process that is
        # killed, and obstore can neither list nor abort those.
        self._call("write", key, lambda: _obstore().put(self._client(len(data)), key, data, use_multipart=False))

    def get(self, key: str, limit_bytes: int) -> bytes | None:
        """Read an object; None if there is none.

        Raises:
            CheckpointDamaged: It has more than ``limit_bytes``; or it is a file, and not a regular one.
        """

        def read() -> bytes | int:
            if self.folder is not None:
                return read_below(self.folder, key, limit_bytes)
            found = _obstore().get(self._client(0), key)
            size: int = found.meta["size"]
            return size if size > limit_bytes else bytes(found.bytes())

        data = self._read(key, read)
        if isinstance(data, int):
            raise CheckpointDamaged(f"{self.url}/{key} has {data:,} bytes, more than {limit_bytes:,}")
        return data

    def get_range(self, key: str, begin: int, nbytes: int) -> bytes | None:
        """Read some bytes of an object, at least one; None if there is none. Raises as `get` does."""

        def read() -> bytes:
            if self.folder is None:
                return bytes(_obstore().get_range(self._client(nbytes), key, start=begin, length=nbytes))
            with open(open_below(self.folder, key), "rb") as file:
                file.seek(begin)
                return file.read(nbytes)

        return self._read(key, read)

    def _read(self, key: str, read: Callable[[], T]) -> T | None:
        if self.folder is None:
            return self._call("read", key, read, may_lack=True)
        try:
            if not self.folder.is_dir():
                return None
            return self._call("read", key, read, may_lack=True, unsafe=True)
        except UnsafeFile as error:
            raise CheckpointDamaged(f"{self.url}/{key} cannot be read: {error.strerror}") from error

    def sizes(self, below: str = "") -> dict[str, int]:
        """The bytes of all objects, or of those below a prefix that ends with a slash, by their keys."""

        def listed() -> dict[str, int]:
            pages = _obstore().list(self._client(0), below.rstrip("/") or None, chunk_size=1000)
            return {one["path"]: one["size"] for page in pages for one in page}

        if self.folder is not None:
            if not self.folder.is_dir():
                return {}
            return self._call("list", below, functools.partial(self._files, below.rstrip("/")), may_lack=True) or {}
        return self._call("list", below, listed) or {}

    def _files(self, below: str) -> dict[str, int]:
        """The same where the objects are files: those that are ours, in no folder that is a link."""
        assert self.folder is not None
        found: dict[str, int] = {}
        for entry in list_below(self.folder, below or "."):
            key, status = f"{below}/{entry.name}" if below else entry.name, entry.stat(follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                if not _STAGED.fullmatch(entry.name):
                    found[key] = status.st_size
            elif stat.S_ISDIR(status.st_mode) and not below and _OURS.match(key):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    found |= self._files(key)
        return found

    def _unlink(self, key: str) -> None:
        assert self.folder is not None
        unlink_below(self.folder, key)
        if above := os.path.dirname(key):
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(self.folder / above)

    def _write(self, key: str, data: bytes | memoryview) -> None:
        """Write an object that is a file, through no link; it is durable, and so are the folders that it lies in."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        if above := os.path.dirname(key):
            make_folder_below(self.folder, above)
        replace_below(self.folder, key, [data])
        for folder in (self.folder, self.folder.parent):
            disk.sync_folder(folder)

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        if self.folder is not None:
            self._call("delete", key, lambda: self._unlink(key), may_lack=True)
        else:
            self._call("delete", key, lambda: _obstore().delete(self._client(0), key), may_lack=True)

    def clear_staged(self) -> None:
        """Remove the traces of killed processes that no listing shows. Only while nobody is writing."""
        if self.folder is not None:
            self._call("clean", "", self._clear_staged)

    def _clear_staged(self) -> None:
        assert self.folder is not None
        for entry in list_below(self.folder, "."):  # only where ours are: somebody else's may lie beside them
            if not entry.is_dir(follow_symlinks=False):
                self._unlink_staged(entry.name)
            elif _OURS.match(entry.name):
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    for inside in list_below(self.folder, entry.name):
                        self._unlink_staged(f"{entry.name}/{inside.name}")
                with contextlib.suppress(OSError):  # it is not empty
                    os.rmdir(self.folder / entry.name)

    def _unlink_staged(self, key: str) -> None:
        assert self.folder is not None
        name = os.path.basename(key)
        if _STAGED.fullmatch(name) and ("/" in key or _OURS.match(name[1:])):
            unlink_below(self.folder, key)

    # -------------------------------------------------------------------------------------------- obstore

    def _call(
        self, action: str, key: str, function: Callable[[], T], *, may_lack: bool = False, unsafe: bool = False
    ) -> T | None:
        """Make a call; None if it met no object, where that may be. `UnsafeFile` is raised as it is if ``unsafe``."""
        try:
            return function()
        except (OSError, ValueError, RuntimeError, _obstore().exceptions.BaseError) as error:
            if may_lack and isinstance(error, FileNotFoundError) and not lacks_container(error):
                return None
            if unsafe and isinstance(error, UnsafeFile):
                raise
            problem = explain(error, action, f"{self.url}/{key}".rstrip("/"), self.address.scheme)
        # Not in the handler: obstore's error would come along as its context, with all that it quotes.
        raise problem

    def _client(self, nbytes: int) -> Any:
        """A client whose requests may take as long as so many bytes need."""
        size = 0 if nbytes <= 2**20 else 1 << (nbytes - 1).bit_length()
        with self._lock:
            if size not in self._clients:
                self._clients[size] = self._connect(size)
            return self._clients[size]

    def _connect(self, nbytes: int) -> Any:
        stores, address, limits = _obstore().store, self.address, self._limits
        if address.scheme == "file":
            return stores.LocalStore(Path(address.prefix))
        kind = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}[address.scheme]
        # With options of ours, obstore no longer takes any from the environment.
        variables = {option: _PREFIXES[address.scheme] + option.upper() for option in _CLIENT_OPTIONS}
        options = {
            "connect_timeout": datetime.timedelta(seconds=limits.connect_s),
            "timeout": datetime.timedelta(seconds=limits.request_s + nbytes / limits.slowest_bytes_per_s),
        } | {option: os.environ[name] for option, name in variables.items() if name in os.environ}
        retries = {
            "max_retries": limits.retries,
            "retry_timeout": datetime.timedelta(seconds=limits.retry_s),
        }
        return kind(address.bucket, prefix=address.prefix or None, client_options=options, retry_config=retries)


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        raise UploadError("uploading checkpoints needs obstore: pip install 'stagecast[upload]'") from error
    return obstore
