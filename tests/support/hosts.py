"""Processes that see each other as separate hosts: namespaces of network, name and processes, joined by a cable."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.scripts import ROOT

_NETWORK = "10.77.0"
_CABLE = "cable"


class Host:
    """Runs one Python program on a host of its own, as rank of a group whose store is on the first host."""

    def __init__(self, program: Path, rank: int, ranks: int) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment = clean | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": f"{_NETWORK}.1",
            "MASTER_PORT": "29500",
            "GLOO_SOCKET_IFNAME": _CABLE,
        }
        start = f'hostname host-{rank} && ip link set lo up && echo ready && read go && exec "{sys.executable}" "$0"'
        spaces = ["--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._rank, self._errors = rank, program.parent / f"stderr-{rank}"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                ["unshare", *spaces, "sh", "-c", start, str(program)],
                cwd=program.parent,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

    @property
    def errors(self) -> str:
        """What the program has printed on stderr."""
        return self._errors.read_text()

    def ip(self, *words: str) -> None:
        """Run ``ip`` on this host."""
        subprocess.run(["nsenter", f"--target={self.process.pid}", "--net", "ip", *words], check=True)

    def read(self, timeout_s: float) -> bytes:
        """Return what the program has printed since the last call; wait for it until a timeout."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        return os.read(self.process.stdout.fileno(), 65_536) if ready else b""

    def plug(self) -> None:
        """Give the cable an address, and start the program."""
        self.ip("addr", "add", f"{_NETWORK}.{self._rank + 1}/24", "dev", _CABLE)
        self.ip("link", "set", _CABLE, "up")
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Kill it, with its namespaces."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


class TwoHosts:
    """Two hosts with a cable between them. Skips the test where the machine forbids namespaces."""

    def __init__(self, program: Path) -> None:
        missing = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
        if missing:
            pytest.skip(f"no {' and no '.join(missing)} on the PATH")
        self.hosts = [Host(program, rank, 2) for rank in range(2)]
        if any(host.read(20) != b"ready\n" for host in self.hosts):
            reason = " ".join(host.errors for host in self.hosts)
            self.close()
            pytest.skip(f"no namespaces of network, host name and processes: {reason.strip()}")
        first, second = (str(host.process.pid) for host in self.hosts)
        cable = ["ip", "link", "add", _CABLE, "netns", first, "type", "veth", "peer", "name", _CABLE, "netns", second]
        made = subprocess.run(cable, capture_output=True, text=True, check=False)
        if made.returncode:
            self.close()
            pytest.skip(f"no cable between namespaces: {made.stderr.strip()}")
        for host in self.hosts:
            host.plug()

    def cut(self) -> None:
        """Cut the cable: neither host gets a packet of the other, and no connection is closed."""
        self.hosts[1].ip("link", "set", _CABLE, "down")

    def heal(self) -> None:
        """Join them again."""
        self.hosts[1].ip("link", "set", _CABLE, "up")

    def close(self) -> None:
        for host in self.hosts:
            host.close()
