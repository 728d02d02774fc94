"""Jobs of a service: written before they are accepted, taken by one process each, and bounded."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
import pytest

from events.run.job import LOCK_NAME, FileLock, ServiceJob, read_job, settle_job, write_job
from events.run.summary import Summary
from events.table.table import RunTable
from trainer import job_folder
from trainer.job_folder import MOST_KILLS, JobFolder, Unavailable
from trainer.remote.launch_arguments import argument_errors
from trainer.run_manager import RunManager

pytestmark = pytest.mark.anyio


class Device:
    """Opens runs that fail when they are released, and notes which were open at once."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.open = 0
        self.most = 0
        self.released = anyio.Event()

    @asynccontextmanager
    async def __call__(self, job: ServiceJob) -> AsyncIterator[Any]:
        self.opened.append(job.run_id)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            await self.released.wait()
        finally:
            self.open -= 1
        raise RuntimeError("released")
        yield


async def until(manager: RunManager, *states: str) -> None:
    with anyio.fail_after(20):
        while [job.state for job in await manager.jobs()] != [*states]:  # noqa: ASYNC110  # clients poll, too
            await anyio.sleep(0.01)


async def test_a_request_is_on_the_disk_when_it_is_accepted_and_its_name_is_taken(tmp_path: Path) -> None:
    """Also after the end of the run, unless the client asks to continue it. A refused request leaves nothing."""
    device = Device()
    async with RunManager.open(tmp_path, device) as manager:
        await manager.start("one", {"lr": 0.1})
        job = read_job(tmp_path / "one")
        assert job is not None
        assert (job.request, job.is_over) == ({"lr": 0.1}, False)
        with pytest.raises(Unavailable, match="one is queued or under way"):
            await manager.start("one", {}, again=True)
        device.released.set()
        await until(manager, "failed")
        with pytest.raises(Unavailable, match="one is failed already; ask to continue it, or choose another run_id"):
            await manager.start("one", {})
        with pytest.raises(Unavailable, match="one is failed"):
            await manager.stop("one", "too late")
        with pytest.raises(ValueError, match="more than 1,048,576"):
            await manager.start("large", {"text": "x" * 2**20})
        assert not (tmp_path / "large").exists()
        await manager.start("one", {"lr": 0.2}, again=True)
        await until(manager, "failed")
        job = await manager.job("one")
        assert job is not None
        assert (job.request, job.reason) == ({"lr": 0.2}, "RuntimeError: released")


async def test_managers_that_share_a_folder_share_its_device_and_no_job(tmp_path: Path) -> None:
    """The one that is left takes the jobs of the other; what is queued at the end stays queued."""
    device = Device()
    async with RunManager.open(tmp_path, device, at_once=2) as one:
        async with RunManager.open(tmp_path, device, at_once=2, stop_s=0.0) as other:
            for number, manager in enumerate([one, other, other, one, other]):
                await manager.start(f"run-{number}", {})
            await until(one, "starting", "starting", "queued", "queued", "queued")
            jobs = await one.jobs()
            assert [one.position(job, jobs) for job in jobs] == [None, None, 1, 2, 3]
            await one.stop("run-4", "not needed")  # the other has it
            await until(other, "starting", "starting", "queued", "queued", "cancelled")
        assert read_job(tmp_path / "run-2").state == "queued"  # type: ignore[union-attr]
        device.released.set()
        await until(one, "failed", "failed", "failed", "failed", "cancelled")
    assert device.most == 2
    assert sorted(device.opened) == ["run-0", "run-1", "run-1", "run-2", "run-3"]  # run-1 was stopped with its manager


async def test_a_job_that_kills_its_service_again_and_again_fails(tmp_path: Path) -> None:
    """It would keep every service of the folder from its other jobs."""
    for kills, name in ((MOST_KILLS, "deadly"), (0, "unlucky")):
        (tmp_path / name).mkdir()
        write_job(tmp_path / name, ServiceJob(name, {}, asked=float(kills), state="running", kills=kills))
    async with RunManager.open(tmp_path, Device(), stop_s=0.0) as manager:
        await until(manager, "starting", "failed")
        job = await manager.job("deadly")
        assert job is not None
        assert job.reason == f"the service was killed {MOST_KILLS + 1} times while it ran"


async def test_jobs_are_bounded_and_a_damaged_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another name is none, either: folders may be copied."""
    monkeypatch.setattr(job_folder, "MOST_JOBS", 2)
    for name, data in (
        ("torn", b'{"run_id": "to'),
        ("copy", msgspec.json.encode(ServiceJob("original", {}, asked=1.0))),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").write_bytes(data)
    async with RunManager.open(tmp_path, Device(), stop_s=0.0) as manager:
        for number in range(2):
            await manager.start(f"run-{number}", {})
        with pytest.raises(Unavailable, match="2 runs are queued or under way, the maximum"):
            await manager.start("run-2", {})
        monkeypatch.setattr(job_folder, "MOST_LISTED", 1)  # those that are not over are listed in any case
        assert [job.run_id for job in await manager.jobs()] == ["run-0", "run-1"]


def test_a_job_of_a_dead_process_is_taken_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is released meanwhile, for other processes too."""
    folder = JobFolder(tmp_path, slots=1)
    (tmp_path / "one").mkdir()
    write_job(tmp_path / "one", ServiceJob("one", {}, asked=1.0, state="running"))

    def refuse(run_dir: Path, job: ServiceJob) -> ServiceJob:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(job_folder, "write_job", refuse)
        assert folder.take_orphans(()) == []
    (taken,) = folder.take_orphans(())
    assert (taken.job.state, taken.job.kills) == ("queued", 1)
    taken.lock.release()


def test_tables_show_jobs_without_a_journal(tmp_path: Path) -> None:
    """A queued one, and one that has failed before its first event; the journal decides for the others."""
    table = RunTable(tmp_path)
    (tmp_path / "one").mkdir()
    job = write_job(tmp_path / "one", ServiceJob("one", {}, asked=5.0))
    assert [(entry.name, entry.run.status, entry.run.started) for entry in table.look()] == [("one", "queued", 5.0)]
    write_job(tmp_path / "one", msgspec.structs.replace(job, state="failed", reason="no data \udcff"))
    (entry,) = table.look()
    assert (entry.run.status, entry.run.reason) == ("failed", "no data \\udcff")
    lock = FileLock.take(tmp_path / "one", LOCK_NAME)
    assert (lock is not None, FileLock.take(tmp_path / "one", LOCK_NAME)) == (True, None)
    finished = Summary("one", 1, "finished", updated=9.0)
    for state, status in (("running", "finished"), ("failed", "finished"), ("queued", "queued")):
        run = msgspec.structs.replace(finished)
        settle_job(run, msgspec.structs.replace(job, state=state))
        assert run.status == status


def factory(run_id: str, width: int, rate: Annotated[float, msgspec.Meta(gt=0)] = 0.1) -> None: ...


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"width": 3, "rate": 1}, {}),
        ({}, {"width": "width: is missing; give it"}),
        ({"width": "3"}, {"width": "width = '3': Expected `int`, got `str`"}),
        ({"width": 3, "rate": 0}, {"rate": "rate = 0: Expected `float` > 0.0"}),
        ({"width": 3, "with": 3}, {"with": "with: is not known; did you mean width?"}),
        ({"width": 3, "run_id": "x"}, {"run_id": "run_id: is not known"}),
    ],
)
def test_wrong_arguments_of_a_factory_are_named(given: Any, expected: Any) -> None:
    """By its annotations."""
    errors = argument_errors(f"{__name__}:factory", given, frozenset({"run_id"}))
    assert errors.keys() == expected.keys()
    for name, text in expected.items():
        assert text in errors[name]


def test_a_factory_that_cannot_be_imported_is_named() -> None:
    """By the empty name."""
    assert "ModuleNotFoundError" in argument_errors("no_such_module:f", {})[""]
    assert "AttributeError" in argument_errors("json:no_such_function", {})[""]
