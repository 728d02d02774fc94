"""The folder of an attempt, and the checkpoint from which it resumes."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any, Final

import msgspec

from events.checkpoint.manifest import CheckpointName
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CHECKPOINTS_DIR, CheckpointStore
from events.errors import RunFolderError
from events.log import Warned, collecting
from events.run.folder import RunFolder
from trainer.checkpoint.fetch import KEYWORDS, fetch_for
from trainer.checkpoint.init_from import InitFrom
from trainer.distributed.world import SINGLE, World

_TOKEN_NAME: Final = "ranks.token"


class RunPlace:
    """The folder of an attempt, and the checkpoint from which it resumes.

    Attributes:
        settings: When it takes checkpoints; None: never.
        warned: The warnings of `fetch`.
        world: The ranks that train together.
        attempt: The number of the attempt, which rank 0 has claimed; None on rank 0.
    """

    attempt: int | None = None

    def __init__(
        self,
        run_id: str,
        run_dir: Path | None,
        settings: Checkpoints | None,
        resume: str | os.PathLike[str] | None,
        init_from: InitFrom | None,
    ) -> None:
        self.run_id = run_id
        self.run_dir = run_dir
        self.settings = settings
        self.resume = resume
        self.init_from = init_from
        self._fetch = fetch_for("resume", resume, settings, run_id, run_dir)
        self._fetch_weights = None
        if init_from is not None:
            self._fetch_weights = fetch_for("init_from", init_from.path, None, run_id, run_dir)
        self.warned: list[Warned] = []
        self.world: World = SINGLE

    def open(self) -> RunFolder | None:
        """Open the run's folder; None without one. Raises `RunFolderError`."""
        return None if self.run_dir is None else RunFolder.open(self.run_dir, self.run_id)

    @property
    def shown_dir(self) -> str | None:
        """The run's folder, for sinks and results."""
        return None if self.run_dir is None else str(self.run_dir.absolute())

    @property
    def chosen(self) -> tuple[Any, ...]:
        """The arguments with which another rank makes the same place, after `fetch`."""
        run_dir = None if self.run_dir is None else self.run_dir.absolute()
        resume = None if self.resume is None else os.fspath(self.resume)
        return self.run_id, run_dir, self.settings, resume, self.init_from

    def check_shared(self) -> None:
        """Check that every rank sees the folder, if it reads or writes there. WAIT: for all ranks.

        Raises:
            RunFolderError: This rank does not see it, or sees another one.
        """
        writes = self.world.shards and self.settings is not None
        if self.run_dir is None or (self.resume is None and not writes):
            return
        world, token = self.world, self.run_dir / _TOKEN_NAME
        if world.leads:
            token.write_text(nonce := secrets.token_hex(8))
        else:
            nonce = ""
        nonce = world.share(nonce)

        def check() -> None:
            with contextlib.suppress(OSError):
                if token.read_text() == nonce:
                    return
            raise RunFolderError(
                f"the run folder {self.run_dir} of rank 0 is not visible to rank {world.rank} on {world.host}; set"
                f" run_dir to a folder that all ranks share"
            )

        try:
            world.together(check)
        finally:
            if world.leads:
                token.unlink(missing_ok=True)

    @property
    def is_remote(self) -> bool:
        """Whether something has to be fetched first."""
        return self._fetch is not None or self._fetch_weights is not None

    def fetch(self) -> None:
        """Fetch it. Waits for the network."""
        if self._fetch is not None:
            with collecting(self.warned):
                self.resume = self._fetch() or self.resume
        if self._fetch_weights is not None and self.init_from is not None:
            with collecting(self.warned):
                path = None if self._resumes else self._fetch_weights()
            self.init_from = None if path is None else msgspec.structs.replace(self.init_from, path=str(path))

    @property
    def _resumes(self) -> bool:
        """Whether the run is going to resume, so that it needs no other weights."""
        if self.resume != "auto":
            return self.resume is not None
        return self.run_dir is not None and any(CheckpointStore(self.run_dir / CHECKPOINTS_DIR).candidates())


def is_within(resume: str | os.PathLike[str], run_dir: str | os.PathLike[str]) -> bool:
    """Whether ``resume`` means something in the run's own folder."""
    if resume in KEYWORDS or CheckpointName.parse(os.fspath(resume)) is not None:
        return True
    try:
        return "://" not in os.fspath(resume) and Path(resume).resolve().is_relative_to(Path(run_dir).resolve())
    except (OSError, ValueError):
        return False  # opening it raises the reason
