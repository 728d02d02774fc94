"""Launched runs on several processes: watched, controlled, failing on one rank, and killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.threads import wait_until
from support.training import read_journal

from events.errors import RunCancelled
from events.messages import CommandTaken, RunEnded, RunStarted, TrainStepEnded, WarningLogged
from events.protocol import RunResult
from trainer.errors import ArgumentsError, LaunchedRunCrashed, LaunchedRunFailed
from trainer.remote.launch import launch

JOBS = Path(__file__).parent / "launched"
FOREVER = 1_000_000
LIMIT_S = 90.0
asyncio_only = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@pytest.fixture(autouse=True)
def _jobs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the factories importable in all processes; no process may outlive its test."""
    monkeypatch.syspath_prepend(str(JOBS))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    assert ranks_of(os.getpid()) == []


def _processes() -> dict[int, tuple[int, int]]:
    """Return parent and group of each live process."""
    found: dict[int, tuple[int, int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        try:
            state, parent, group, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if state != "Z":
            found[pid] = int(parent), int(group)
    return found


def ranks_of(parent: int) -> list[int]:
    """Return the live ranks of a process: each leads a process group."""
    return [pid for pid, about in _processes().items() if about == (parent, pid)]


async def trained(run_dir: Path, *, processes: int = 2, **arguments: Any) -> RunResult:
    """Train to the end."""
    with anyio.fail_after(LIMIT_S):
        async with launch("launched_ranks:build", arguments, run_dir=run_dir, run_id="it", processes=processes) as run:
            return await run.result()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"processes": 0}, "processes must be a number from 1 to 1,024, not 0"),
        ({"processes": True}, "processes must be a number from 1 to 1,024, not True"),
        ({"processes": "2"}, "processes must be a number from 1 to 1,024, not '2'"),
        ({"processes": 5_000}, "not 5000"),
        ({"processes": 2, "env": {"RANK": "1"}}, "env: RANK is set for each of the 2 processes; remove it"),
    ],
)
def test_wrong_numbers_of_processes_are_refused_before_one_starts(given: Any, told: str) -> None:
    with pytest.raises(ArgumentsError, match=told):
        launch("launched_ranks:build", **given)


@asyncio_only
@pytest.mark.anyio
async def test_a_run_on_two_processes_has_the_events_commands_and_result_of_any_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {"rank": 1, "deed": "warn", "epochs": FOREVER, "step_s": 0.005}
    steps: list[int] = []
    saved = ""
    with anyio.fail_after(LIMIT_S):
        async with launch("launched_ranks:build", arguments, run_dir=tmp_path / "run", processes=2) as run:
            async for event in run.events(since=0, types=[TrainStepEnded]):
                steps.append(event.global_step)
                if len(steps) == 20:
                    saved = await run.checkpoint()
                    run.stop("enough")
        result = await run.result()
    assert (result.status, result.reason, result.problems) == ("stopped", "enough", [])
    assert steps == list(range(1, result.global_step + 1))
    assert f"{saved}/manifest.json" in [str(path) for path in (tmp_path / "run/checkpoints").glob("*/manifest.json")]
    taken = [event.command for event in read_journal(tmp_path / "run") if isinstance(event, CommandTaken)]
    assert taken == ["checkpoint", "stop"]
    assert "rank 1: a word of warning" in caplog.messages
    logs = [(tmp_path / "run" / name).read_text() for name in ("log.txt", "log-rank-1.txt")]
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for log in logs:
        assert f"OMP_NUM_THREADS={threads}" in log
    assert "a word of warning" in logs[1]
    assert "a word of warning" not in logs[0]


@asyncio_only
@pytest.mark.anyio
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_killed_rank_is_named_ends_the_others_and_the_run_can_be_resumed(rank: int, tmp_path: Path) -> None:
    with pytest.raises(
        LaunchedRunCrashed, match=rf"the process of rank {rank} of run it was killed by SIGKILL"
    ) as died:
        more = {"at": 60, "every_steps": 2, "step_s": 0.01}
        await trained(tmp_path / "run", rank=rank, deed="kill", epochs=FOREVER, **more)
    assert (died.value.returncode, died.value.signal) == (-9, "SIGKILL")
    assert "about to be killed" in died.value.log_tail
    assert f"run/{'log-rank-1' if rank else 'log'}.txt" in str(died.value)
    ended = [event for event in read_journal(tmp_path / "run") if isinstance(event, RunEnded)]
    if rank:
        assert [(event.status, str(event.reason)[:10]) for event in ended] == [("failed", "rank 1 on ")]
    else:
        assert ended == []
        with anyio.fail_after(LIMIT_S):
            async with launch(
                "launched_ranks:build", {"epochs": 40}, run_dir=tmp_path / "run", resume="auto", processes=2
            ) as run:
                result = await run.result()
        assert (result.run_id, result.attempt, result.global_step) == ("it", 2, 80)
        started = [event for event in read_journal(tmp_path / "run") if isinstance(event, RunStarted)]
        assert [event.global_step > 0 for event in started] == [False, True]


@asyncio_only
@pytest.mark.anyio
async def test_an_exception_names_the_rank_that_has_raised_it(tmp_path: Path) -> None:
    """In a step, and in the factory, where the other rank waits for it to join."""
    with pytest.raises(LaunchedRunFailed, match=r"rank 1: launched_jobs\.Diverged: it was höher") as failed:
        await trained(tmp_path / "step", rank=1, deed="fail", epochs=FOREVER)
    assert failed.value.type_name == "launched_jobs.Diverged"
    assert "the cause" in failed.value.traceback
    ended = next(event for event in read_journal(tmp_path / "step") if isinstance(event, RunEnded))
    assert ended.status == "failed"
    assert "rank 1 on " in str(ended.reason)
    assert "Diverged: it was höher" in str(ended.reason)
    with pytest.raises(LaunchedRunFailed, match="rank 1: ValueError: not on rank 1"):
        await trained(tmp_path / "factory", rank=1, deed="refuse")


@asyncio_only
@pytest.mark.anyio
async def test_processes_that_would_train_alone_are_refused_and_a_cancelled_run_ends_on_all(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="strategy='single' trains in each of the 2 processes for itself; let the"):
        await trained(tmp_path / "single", strategy="single")
    assert not (tmp_path / "single").exists()
    long = launch("launched_ranks:build", {"epochs": FOREVER}, run_dir=tmp_path / "run", processes=2)
    async with anyio.create_task_group() as tasks, long as run:
        async for event in run.events(since=0, types=[TrainStepEnded]):
            if event.global_step >= 3:
                tasks.cancel_scope.cancel()
    with pytest.raises(RunCancelled):
        await run.result()
    assert [event.status for event in read_journal(tmp_path / "run") if isinstance(event, RunEnded)] == ["cancelled"]


PARENT = """
import sys, anyio
sys.path.insert(0, {jobs!r})
from events.messages import TrainStepEnded
from trainer import launch

async def main():
    arguments = {{"epochs": 1_000_000, "step_s": 0.01}}
    async with launch("launched_ranks:build", arguments, run_dir="run", processes=2) as run:
        async for event in run.events(since=0, types=[TrainStepEnded]):
            if event.global_step == 3:
                print("ready", flush=True)

anyio.run(main)
"""


def test_ranks_whose_parent_is_killed_stop_with_a_checkpoint(script: Any, tmp_path: Path, anyio_backend: str) -> None:
    program = script(PARENT.format(jobs=str(JOBS)))
    program.wait_for("ready")
    left = ranks_of(program.process.pid)
    assert len(left) == 2
    program.signal(signal.SIGKILL)
    wait_until(lambda: not _processes().keys() & set(left), "a process is left")
    journal = read_journal(tmp_path / "run")
    ended = next(event for event in journal if isinstance(event, RunEnded))
    assert (ended.status, ended.reason) == ("stopped", "the process that launched the run is gone")
    assert (tmp_path / f"run/checkpoints/step-{ended.global_step}.a1/manifest.json").exists()
    assert [event for event in journal if isinstance(event, WarningLogged)] == []
