"""One view for many clients: consecutive frames, or a new snapshot."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from live.kit import Story, Told, Watcher

from events.errors import ArgumentsError
from events.journal.segment import segment_numbers
from events.messages import CheckpointSaved
from events.table.entry import EntryReader
from sinks.live import folder_hub as folder_hub_module
from sinks.live import hub as hub_module
from sinks.live.access import Access
from sinks.live.app import LiveApp
from sinks.live.folder_hub import FolderHub
from sinks.live.hub import Hub
from sinks.live.runs import RunsOfFolder
from sinks.live.stored import STORE_NAME, read_view

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def driven(hub: Hub) -> AsyncIterator[None]:
    """Run the hub, as for a client."""
    async with anyio.create_task_group() as tasks:
        await tasks.start(hub.drive)
        yield
        tasks.cancel_scope.cancel()


async def follow(hub: Hub, watcher: Any, until: int, number: int | None = None) -> int | None:
    """Hand a watcher its messages up to an event, as the application does."""
    generation = hub.frames.generation
    with anyio.fail_after(20):
        while watcher.cursor is None or watcher.cursor < until:
            if number is None or generation != hub.frames.generation:
                snapshot = await hub.snapshot()
                number, generation = snapshot.number + 1, snapshot.generation
                watcher.take(snapshot.data)
                continue
            while hub.frames.newest < number and generation == hub.frames.generation:
                await hub.frames.news.wait()
            if generation == hub.frames.generation:
                frame = hub.frames.get(number)
                number = None if frame is None else number + 1
                if frame is not None:
                    watcher.take(frame.data)
    return number


async def test_an_attempt_that_resumes_earlier_brings_a_snapshot_without_superseded_steps(told: Told) -> None:
    """By a sink's thread."""
    tell = told.story
    hub, watcher = Hub(told.path), Watcher()
    first = [tell.started(), *tell.steps(20), tell(CheckpointSaved, checkpoint="step-15.a1", path="p", global_step=15)]
    again = [*tell.resumed(15, tell.seq - 6), *tell.steps(3)]
    async with driven(hub):
        told.write(*first)
        hub.feed(first)
        await follow(hub, watcher, first[-1].seq)
        assert watcher.points["train_loss"][-1][0] == 20
        told.write(*again)
        await anyio.to_thread.run_sync(hub.feed, again)
        await follow(hub, watcher, tell.seq)
    assert watcher.steps() == list(range(1, 19))
    assert (watcher.attempt, watcher.run["attempt"], watcher.run["status"]) == (2, 2, "running")
    assert list(watcher.checkpoints) == ["step-15.a1"]


async def test_without_a_journal_checkpoints_and_lines_survive_a_resume(story: Story) -> None:
    """The curves start again."""
    hub, watcher = Hub(), Watcher()
    async with driven(hub):
        hub.feed([story.started(), *story.steps(5), story(CheckpointSaved, checkpoint="step-5.a1", path="p")])
        hub.feed([*story.resumed(5, story.seq), *story.steps(2)])
        await follow(hub, watcher, story.seq)
    assert list(watcher.checkpoints) == ["step-5.a1"]
    assert watcher.steps() == [6, 7]


async def test_one_batch_may_have_the_end_of_an_attempt_and_the_start_of_the_next(told: Told) -> None:
    tell = told.story
    hub, watcher = FolderHub(told.path), Watcher()
    await hub.refresh()
    told.write(tell.started(), *tell.steps(10), *tell.resumed(5, tell.seq - 5), *tell.steps(10))
    async with driven(hub):
        await hub.refresh()
        await follow(hub, watcher, tell.seq)
    assert watcher.steps() == list(range(1, 16))


async def test_events_that_are_delivered_again_are_not_shown_again(story: Story) -> None:
    hub, watcher = Hub(), Watcher()
    events = [story.started(), *story.steps(10)]
    async with driven(hub):
        for begin in (0, 3, 0, 6):
            hub.feed(events[begin:])
        await follow(hub, watcher, 11)
    assert len(watcher.points["train_loss"]) == 10


async def test_a_thousand_resumes_lose_and_repeat_nothing(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watchers that leave and return at random have each point once, in order."""
    monkeypatch.setattr(hub_module, "FRAME_S", 0.002)
    generator = random.Random(0)
    hub, fed, over = Hub(), [], anyio.Event()
    resumed = waiting = 0

    async def come_and_go(watcher: Any) -> None:
        nonlocal resumed, waiting
        for _ in range(50):
            async with driven(hub):
                number = None if watcher.cursor is None else hub.resume(watcher.attempt, watcher.cursor)
                resumed += number is not None
                await follow(hub, watcher, story.seq, number)
            await anyio.sleep(generator.random() * 0.005)
        waiting += 1
        await over.wait()
        async with driven(hub):
            number = hub.resume(watcher.attempt, watcher.cursor)
            await follow(hub, watcher, story.seq, number)

    async def feed() -> None:
        while waiting < 20 and len(fed) < 1_990:  # so that a snapshot has each step in a point of its own
            events = [story.started()] if not story.seq else [story.step()]
            fed.extend(events)
            await anyio.to_thread.run_sync(hub.feed, events)
            await anyio.sleep(0.001)
        over.set()

    watchers = [Watcher() for _ in range(20)]
    async with driven(hub), anyio.create_task_group() as tasks:  # one stays all along
        for watcher in watchers:
            tasks.start_soon(come_and_go, watcher)
        tasks.start_soon(feed)
    expected = [(event.global_step, event.loss) for event in fed[1:]]
    assert all(watcher.points["train_loss"] == expected for watcher in watchers)
    assert resumed > 500


async def test_a_flood_brings_a_snapshot_instead_of_a_giant_frame(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More events between two frames than a frame may have."""
    monkeypatch.setattr(hub_module, "MOST_IN_A_FRAME", 5_000)
    hub, watcher = Hub(), Watcher()
    async with driven(hub):
        number = await follow(hub, watcher, 0)
        hub.feed([story.started(), *story.steps(20_000)])
        await follow(hub, watcher, story.seq, number)
    assert set(watcher.kinds) == {"snapshot"}
    assert watcher.points["train_loss"][-1][0] == 20_000


async def test_another_watcher_makes_frames_when_the_one_that_made_them_leaves(story: Story) -> None:
    """Each of three leaves in turn; the last receives all."""
    hub, watcher = Hub(), Watcher()
    async with anyio.create_task_group() as all_tasks:
        async with anyio.create_task_group() as leaders:
            scopes: list[anyio.CancelScope] = []

            async def one(task_status: Any = anyio.TASK_STATUS_IGNORED) -> None:
                with anyio.CancelScope() as scope:
                    scopes.append(scope)
                    await hub.drive(task_status=task_status)

            for _ in range(3):
                await leaders.start(one)
            await all_tasks.start(hub.drive)
            number = None
            for scope in scopes:
                hub.feed([story.step()])
                number = await follow(hub, watcher, story.seq, number)
                scope.cancel()
        hub.feed([story.step()])
        await follow(hub, watcher, story.seq, number)
        all_tasks.cancel_scope.cancel()
    assert watcher.steps() == [1, 2, 3, 4]
    assert watcher.kinds.count("snapshot") == 1
    assert not hub.is_watched


async def test_without_a_watcher_no_messages_are_kept(story: Story) -> None:
    """After the last has left; a later one receives everything."""
    hub, watcher = Hub(), Watcher()
    async with driven(hub):
        await follow(hub, watcher, 0)
        hub.feed(story.steps(100))
        await follow(hub, watcher, story.seq)
    newest = hub.frames.newest
    hub.feed(story.steps(1_000))
    assert (hub.frames.nbytes, hub._changes, hub._snapshot, hub.frames.newest) == (0, None, None, newest)
    late = Watcher()
    async with driven(hub):
        assert hub.resume(watcher.attempt, watcher.cursor) is None
        await follow(hub, late, story.seq)
    assert len(late.points["train_loss"]) == 1_100


async def test_a_watcher_that_missed_nothing_resumes_without_a_snapshot(story: Story) -> None:
    """Even as the only one."""
    hub, watcher = Hub(), Watcher()
    hub.feed([story.started(), *story.steps(10)])
    async with driven(hub):
        await follow(hub, watcher, story.seq)
    async with driven(hub):
        number = hub.resume(watcher.attempt, watcher.cursor)
        assert number is not None
        hub.feed(story.steps(1))
        await follow(hub, watcher, story.seq, number)
    assert watcher.kinds.count("snapshot") == 1
    assert len(watcher.points["train_loss"]) == 11


async def test_a_quiet_run_wakes_no_one(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for a sign of life, although the journal is read again and again."""
    monkeypatch.setattr(hub_module, "FRAME_S", 0.01)
    told.start()
    hub, looked, enough = FolderHub(told.path), 0, anyio.Event()

    async def refresh() -> None:
        nonlocal looked
        looked += 1
        if looked == 20:
            enough.set()

    monkeypatch.setattr(hub, "refresh", refresh)
    async with driven(hub):
        await hub.frames.news.wait()  # a first frame
        news = hub.frames.news
        await enough.wait()
        assert hub.frames.news is news


async def test_simultaneous_watchers_share_a_snapshot(story: Story) -> None:
    """Even while events arrive."""
    hub = Hub()
    hub.feed([story.started(), *story.steps(10)])
    found = []

    async def come() -> None:
        hub.feed([story.step()])
        found.append(await hub.snapshot())

    async with driven(hub), anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(come)
    assert len({id(snapshot.data) for snapshot in found}) <= 3


async def test_a_run_whose_process_has_died_is_lost_and_may_resume(told: Told) -> None:
    """No process holds the folder, and the journal has no end; later the next attempt starts."""
    tell = told.story
    told.start(3)
    hub, watcher = FolderHub(told.path), Watcher()
    await hub.refresh()
    assert hub.view.run.status == "running"
    told.let_go()
    hub._looked_at = -1e9
    async with driven(hub):
        await hub.refresh()
        await follow(hub, watcher, tell.seq)
        assert watcher.run["status"] == "lost"
        told.write(*tell.resumed(3, tell.seq))
        await follow(hub, watcher, tell.seq)
    assert watcher.run["status"] == "running"


async def test_a_run_that_ended_is_never_lost(told: Told) -> None:
    """Not even if it ends at that moment."""
    tell = told.story
    told.start()
    hub = FolderHub(told.path)
    await hub.refresh()
    told.write(tell.ended())
    told.let_go()
    hub._looked_at = -1e9
    await hub.refresh()
    assert hub.view.run.status == "finished"


async def test_another_journal_in_the_same_folder_is_another_run(told: Told) -> None:
    """Of the same name: the folder was deleted, and the run started again."""
    tell = told.story
    told.start(50)
    hub, watcher = FolderHub(told.path), Watcher()
    async with driven(hub):
        await hub.refresh()
        await follow(hub, watcher, tell.seq)
        shutil.rmtree(told.path / "journal")
        (told.path / "journal").mkdir()
        again = Story()
        again.time += 1_000_000
        told.write(again.started(), *again.steps(7))
        hub._looked_at = -1e9
        with anyio.fail_after(20):
            while len(watcher.points.get("train_loss", ())) != 7:
                watcher.cursor = None
                await follow(hub, watcher, 1)
                await anyio.sleep(0.01)


async def test_a_journal_that_cannot_be_read_is_read_again(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the run resumes: nothing is missing then."""
    tell = told.story
    told.start(10)
    hub, watcher = FolderHub(told.path), Watcher()
    async with driven(hub):
        await hub.refresh()
        await follow(hub, watcher, tell.seq)

        def refuse(run_dir: Path) -> Any:
            raise PermissionError(13, "not now")

        for module in (hub_module, folder_hub_module):
            monkeypatch.setattr(module, "read_view", refuse)
        told.write(*tell.resumed(5, 6), *tell.steps(10))
        await hub.refresh()
        await hub.refresh()
        monkeypatch.undo()
        await follow(hub, watcher, tell.seq)
    assert watcher.steps() == list(range(1, 16))


async def test_the_view_of_a_long_journal_is_stored(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and again at the end of the run; several servers do not disturb each other."""
    monkeypatch.setattr(folder_hub_module, "_STORE_EVENTS", 100)
    tell = told.story
    told.start(200)
    hubs = [FolderHub(told.path) for _ in range(4)]
    threads = [threading.Thread(target=hub._read_if_due) for hub in hubs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert FolderHub(told.path)._stored_cursor == 0
    told.write(*tell.steps(200), tell.ended())
    hubs[0]._looked_at = -1e9
    await hubs[0].refresh()
    late = FolderHub(told.path)
    await late.refresh()
    assert late._stored_cursor == tell.seq
    assert sorted(path.name for path in told.path.iterdir()) == ["journal", "run.lock", STORE_NAME]


async def test_runs_are_found_by_name_and_never_by_path(told: Told, tmp_path: Path) -> None:
    """The newest first; folders without a run, or that vanish, are ignored."""
    told.start()
    other = Told(tmp_path / "runs" / "elsewhere", "other")
    other.story.time += 1_000
    other.write(other.story.started(), *other.story.steps(5))
    other.let_go()
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "dangling").symlink_to("nowhere")
    runs = RunsOfFolder(tmp_path / "runs")
    found = await runs.summaries(commands=True)
    assert [(run.run_id, run.status, run.commands) for run in found] == [
        ("other", "lost", False),
        ("demo", "running", True),
    ]
    assert await runs.hub("elsewhere") is None
    assert await runs.hub("../runs/demo") is None
    there = await runs.hub("demo")
    assert there is not None
    assert await runs.hub("demo") is there
    await there.refresh()
    assert await runs.hub("demo") is there
    shutil.rmtree(tmp_path / "runs" / "elsewhere")
    assert [run.run_id for run in await runs.summaries(commands=True)] == ["demo"]


async def test_the_runs_of_a_folder_are_found_by_its_path_as_text(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative or not; other values are refused by name."""
    told.start()
    monkeypatch.chdir(told.path.parent)
    (summary,) = await RunsOfFolder(told.path.name).summaries(commands=False)
    hub = await RunsOfFolder(str(told.path.parent)).hub(summary.run_id)
    assert hub is not None
    by_entry, by_view = EntryReader(told.path.name).read().run, read_view(told.path.name)[0].run
    assert by_entry.run_id == by_view.run_id == summary.run_id
    assert segment_numbers(f"{told.path.name}/journal") == [1]
    assert isinstance(LiveApp(told.path.name, Access())._runs, RunsOfFolder)
    for wrong in (3, None, RunsOfFolder):
        with pytest.raises(ArgumentsError, match="must be a folder or RunsOfFolder"):
            LiveApp(wrong, Access())  # type: ignore[arg-type]
    with pytest.raises(ArgumentsError, match=r"RunsOfFolder\(3\) is not a path; give it the folder"):
        RunsOfFolder(3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentsError, match=r"access must be Access\(...\), not 'token'"):
        LiveApp("runs", "token")  # type: ignore[arg-type]


async def test_a_folder_with_another_run_shows_that_one(told: Told, tmp_path: Path) -> None:
    told.start(5)
    runs = RunsOfFolder(told.path)
    old = await runs.hub("demo")
    assert old is not None
    await old.refresh()
    shutil.rmtree(told.path / "journal")
    (told.path / "journal").mkdir()
    told.story.__init__("new")
    told.start()
    new = await runs.hub("new")
    assert new is not None
    await new.refresh()
    assert (new.view.run.run_id, new.view.cursor) == ("new", 1)


async def test_of_runs_with_one_name_the_newest_has_the_name(tmp_path: Path) -> None:
    """Copies of a run's folder: each other one has its own name, and all name another."""
    for name, steps in (("b", 4), ("c", 3)):
        told = Told(tmp_path / name)
        told.write(told.story.started(), *told.story.steps(steps))
        told.let_go()
    running = Told(tmp_path / "a")
    running.write(running.story.started(), *running.story.steps(2))
    runs = RunsOfFolder(tmp_path)
    for steps, status in ((2, "running"), (4, "lost")):
        for _ in range(2):
            listed = {one.run_id: one for one in await runs.summaries(commands=False)}
            assert all("has a run of the same run_id" in one.problems[-1] for one in listed.values())
            one = listed.pop("demo")
            assert (one.status, one.global_step) == (status, steps)
            assert sorted(listed) == (["demo (b)", "demo (c)"] if status == "running" else ["demo (c)"])
            other = await runs.hub("demo (c)")
            assert other is not None
            await other.refresh()
            assert other.view.run.global_step == 3
            assert msgspec.json.decode((await other.snapshot()).data)["run"]["run_id"] == "demo (c)"
            hub = await runs.hub("demo")
            assert hub is not None
            await hub.refresh()
            assert hub.view.run.global_step == steps
        running.let_go()
        shutil.rmtree(running.path, ignore_errors=True)
