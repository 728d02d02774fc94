"""A real NATS server with JetStream, in a process of its own, that can be killed and started again."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from support.threads import WAIT_S, wait_until

from sinks.nats.address import NatsAddress
from sinks.nats.client import Messages, NatsClient


class NatsServer:
    """Listens at one port, whenever it runs; its streams stay when it is killed.

    Args:
        config: Lines of its configuration file.
        jetstream: Whether it has JetStream.
    """

    def __init__(self, folder: Path, config: str = "", *, jetstream: bool = True) -> None:
        self._folder = folder
        self._config = config
        self._jetstream = jetstream
        self._process: subprocess.Popen[bytes] | None = None
        self.port = -1
        self.starts = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        binary = shutil.which("nats-server")
        if binary is None and os.environ.get("CI"):
            pytest.fail("no nats-server on the PATH: apt-get install -y nats-server")
        if binary is None:
            pytest.skip("no nats-server on the PATH")
        self.starts += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "nats.conf"
        config.write_text(f"{self._config}\n")
        ports = Path(tempfile.mkdtemp(dir=self._folder))
        command = [binary, "-c", str(config), "-a", "127.0.0.1", "-p", str(self.port), "--ports_file_dir", str(ports)]
        command += ["-js", "-sd", str(self._folder / "streams")] if self._jetstream else []
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        found: dict[str, Any] = {}

        def answers() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, f"the server did not start: {self.log[-2000:]}"
            for file in ports.glob("*.ports"):
                with contextlib.suppress(ValueError):
                    found.update(json.loads(file.read_text()))
            return bool(found.get("nats") or found.get("tls"))

        wait_until(answers, "the server does not answer")
        self.port = int((found.get("nats") or found["tls"])[0].rpartition(":")[2])
        return self

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()

    def kill(self) -> None:
        """As a crash does."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(WAIT_S)

    def hang(self) -> None:
        """Stop it in the middle of whatever it does; `wake` lets it continue."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        states = [file / "stat" for file in Path(f"/proc/{self._process.pid}/task").iterdir()]
        wait_until(lambda: all(state.read_text().rpartition(")")[2].split()[0] == "T" for state in states))

    def wake(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stored(self, run_id: str, url: str | None = None) -> list[bytes]:
        """The messages of a run that are in the stream now, in order."""
        client = NatsClient.connected(address := NatsAddress.of(url or self.url))

        async def read() -> list[bytes]:
            found: list[bytes] = []
            if (stream := await client.stream()) is not None:
                newest = await client.last(stream, address.events(run_id))
                messages = Messages(client, stream, address.events(run_id), 1)
                while newest is not None and messages.next <= newest[0]:
                    found += [message.data for message in await messages.read(1.0)]
            return found

        try:
            return client.call(read())
        finally:
            client.close()


StartNats = Callable[..., NatsServer]
"""Starts a server: the fixture ``start_nats``. Its arguments are those of `NatsServer`, without the folder."""


def credentials(folder: Path) -> tuple[str, Path]:
    """Make an operator, an account and a user, as ``nsc`` does; return lines of a configuration, and a ``.creds`` file.

    The tokens are JWTs of NATS: https://docs.nats.io/running-a-nats-service/nats_admin/security/jwt
    """
    import nkeys

    def new(kind: int) -> tuple[Any, str, bytes]:
        seed = bytes(nkeys.encode_seed(os.urandom(32), kind))
        pair = nkeys.from_seed(bytearray(seed))
        return pair, pair.public_key.decode(), seed

    def signed(signer: Any, issuer: str, subject: str, name: str, claims: dict[str, Any]) -> str:
        body = {"jti": name, "iat": 1_700_000_000, "iss": issuer, "name": name, "sub": subject}
        parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, body | {"nats": claims | {"version": 2}}]
        text = ".".join(_base64(json.dumps(part).encode()) for part in parts)
        return f"{text}.{_base64(signer.sign(text.encode()))}"

    operator, operator_key, _ = new(nkeys.PREFIX_BYTE_OPERATOR)
    account, account_key, _ = new(nkeys.PREFIX_BYTE_ACCOUNT)
    _, system_key, _ = new(nkeys.PREFIX_BYTE_ACCOUNT)
    _, user_key, user_seed = new(nkeys.PREFIX_BYTE_USER)
    names = ("subs", "data", "payload", "imports", "exports", "conn", "leaf", "mem_storage", "disk_storage", "streams")
    limits = dict.fromkeys((*names, "consumer"), -1) | {"wildcards": True}
    operator_jwt = signed(operator, operator_key, operator_key, "operator", {"type": "operator"})
    account_jwt = signed(operator, operator_key, account_key, "account", {"type": "account", "limits": limits})
    system_jwt = signed(operator, operator_key, system_key, "system", {"type": "account", "limits": {}})
    unlimited = {"subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}}
    user_jwt = signed(account, account_key, user_key, "user", {"type": "user"} | unlimited)
    path = folder / "user.creds"
    path.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user_seed.decode()}\n------END USER NKEY SEED------\n"
    )
    accounts = f"{account_key}: {account_jwt}\n{system_key}: {system_jwt}"
    config = f"operator: {operator_jwt}\nsystem_account: {system_key}\nresolver: MEMORY"
    return f"{config}\nresolver_preload: {{\n{accounts}\n}}", path


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
