"""Run folders that a stranger has prepared, or that are damaged: no other run is disturbed, no other file is shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from live.kit import IMAGE, Serve, Start, Story, Told
from support.threads import wait_until

from events.journal.lines import encode_lines
from events.messages import HistogramLogged, JournalGap, MetricsLogged, RunEnded, RunResumed, TextLogged, WarningLogged
from events.run.damage import damage_line
from events.run.trim import trimmed
from events.safe_files import UnsafeFile, open_below, stat_below
from events.wire import decode_json
from sinks.live.folder_hub import FolderHub
from sinks.live.runs import RunsOfFolder
from sinks.live.series import MOST_SERIES
from sinks.live.stored import STORE_NAME, read_view, write_view
from sinks.live.view import MAX_DETAILS, MAX_LINES, Changes, HistogramStep, RunView

TOKEN = "a-token-of-this-test"
SECRET = b"a-secret-of-the-user"
SEGMENT = "journal/00000000000000000001.jsonl"

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no special files")


@pytest.fixture
def folder(told: Told) -> Path:
    """The folder of the run ``demo``; beside it are secrets and a private run of the user."""
    told.start(20)
    path = told.path.parent
    (path.parent / "secret.png").write_bytes(SECRET)
    (path.parent / "private" / "media").mkdir(parents=True)
    (path.parent / "private" / "media" / "a.png").write_bytes(IMAGE + SECRET)
    (path.parent / "private" / "journal").mkdir()
    (path.parent / "private" / SEGMENT).write_bytes((told.path / SEGMENT).read_bytes().replace(b'"demo"', b'"private"'))
    return path


def a_run(folder: Path, name: str, *, run_id: str | None = None) -> Path:
    told = Told(folder / name, run_id or name, steps=5)
    told.let_go()
    return told.path


PRIVATE: dict[str, Callable[[Path, Path], object]] = {
    # What a run has as its images, given its folder and the folder of the user's private files.
    "folder of images": lambda run, private: (run / "media").symlink_to(private / "media"),
    "image": lambda run, private: in_media(run, "a.png").symlink_to(private / "media" / "a.png"),
    "folder in images": lambda run, private: in_media(run, "sub").symlink_to(private / "media"),
    "secret named as an image": lambda run, private: os.link(private.parent / "secret.png", in_media(run, "a.png")),
}


def in_media(run: Path, name: str) -> Path:
    (run / "media").mkdir()
    return run / "media" / name


@pytest.mark.parametrize("prepare", PRIVATE.values(), ids=PRIVATE)
def test_no_file_outside_a_run_is_shown_as_its_image(
    folder: Path, serve: Serve, prepare: Callable[[Path, Path], object]
) -> None:
    """Whichever part of the path is a link; nor is a file without an image, whatever its name."""
    run = a_run(folder, "evil")
    prepare(run, folder.parent / "private")
    server = serve(RunsOfFolder(folder))
    for name in ("a.png", "sub/a.png", "media/a.png", "media/sub/a.png"):
        answer = httpx.get(f"{server.url}api/runs/evil/media/{name}")
        assert (answer.status_code, SECRET in answer.content) == (404, False)
    (run / "media").unlink() if (run / "media").is_symlink() else None
    (run / "media").mkdir(exist_ok=True)
    (run / "media" / "b.gif").write_bytes(IMAGE)  # by its content, whatever its name
    answer = httpx.get(f"{server.url}api/runs/evil/media/b.gif")
    assert (answer.content, answer.headers["content-type"]) == (IMAGE, "image/png")


def test_a_run_folder_that_is_a_link_is_named_and_not_followed(folder: Path, serve: Serve) -> None:
    """Also if an entry is replaced later. A link to a neighbour is not listed."""
    (folder / "mine").symlink_to(folder.parent / "private")
    (folder / "latest").symlink_to("demo")
    server = serve(RunsOfFolder(folder))
    listed = {run["run_id"]: run for run in httpx.get(f"{server.url}api/runs").json()["runs"]}
    assert sorted(listed) == ["demo", "mine"]
    assert listed["mine"]["status"] == "damaged"
    assert listed["mine"]["damage"] == "it is a symbolic link, which is not opened below a run folder"
    assert httpx.get(f"{server.url}api/runs/private").status_code == 404
    shown = httpx.get(f"{server.url}api/runs/mine").json()
    assert (shown["run"]["status"], shown["series"]) == ("damaged", {})
    assert httpx.get(f"{server.url}api/runs/mine/media/a.png").status_code == 404
    with pytest.raises(UnsafeFile, match="symbolic link"):
        open_below(folder / "mine", SEGMENT)
    with pytest.raises(UnsafeFile, match="symbolic link"):
        stat_below(folder / "mine", "media/a.png")


@pytest.mark.parametrize("place", ["middle", "end"])
def test_a_changed_line_of_a_journal_is_named_once(folder: Path, serve: Serve, place: str) -> None:
    """With count and place: on the page, with a stored view too, and in the journal that clients read."""
    run = a_run(folder, "changed")
    whole = encode_lines([decode_json(line) for line in (run / SEGMENT).read_bytes().splitlines()], 0)
    lines = whole.splitlines(keepends=True)
    number = 3 if place == "middle" else len(lines)
    lines[number - 1] = lines[number - 1].replace(b'"loss":', b'"lass":')
    (run / SEGMENT).write_bytes(b"".join(lines))
    sentence = (
        f"the run's folder is damaged: {SEGMENT}, line {number}: its checksum does not match, so the line was changed"
        " (1 event is lost)"
    )
    for _ in range(2):
        server = serve(RunsOfFolder(folder))
        assert httpx.get(f"{server.url}api/runs/changed").json()["run"]["problems"] == [sentence]
        write_view(run, read_view(run)[0])
    events = [decode_json(line) for line in httpx.get(f"{server.url}api/runs/changed/journal").content.splitlines()]
    assert [event.seq for event in events] == list(range(1, len(lines) + 1))
    [gap] = [event for event in events if isinstance(event, JournalGap)]
    assert (gap.seq, gap.first_seq, gap.last_seq, gap.lost) == (number, number, number, 1)
    assert gap.reason.startswith(f"seq {number}, at line {number} of ")


def test_a_run_cannot_take_the_place_of_another(folder: Path, serve: Serve) -> None:
    """A newer run with another's ``run_id`` gets its own name, and both name the other."""
    evil = Told(folder / "evil", "demo")
    evil.story.time += 1e6
    evil.write(evil.story.started(), *evil.story.steps(3))
    server = serve(RunsOfFolder(folder), commands=True)
    listed = {run["run_id"]: run for run in httpx.get(f"{server.url}api/runs").json()["runs"]}
    assert {name: run["global_step"] for name, run in listed.items()} == {"demo": 20, "demo (evil)": 3}
    assert listed["demo"]["problems"] == ["the folder 'evil' has a run of the same run_id"]
    assert listed["demo (evil)"]["problems"] == ["the folder 'demo' has a run of the same run_id"]
    assert httpx.get(f"{server.url}api/runs/demo").json()["run"]["global_step"] == 20
    shown = httpx.get(f"{server.url}api/runs/demo (evil)").json()["run"]
    assert (shown["run_id"], shown["global_step"]) == ("demo (evil)", 3)
    evil.let_go()


@pytest.mark.parametrize("run_id", ["a/b", "..", "x\x1b[31m", "new\nline", "\u202eevil", "x" * 2_000])
def test_a_run_whose_id_is_not_a_name_is_listed_by_its_folder(folder: Path, serve: Serve, run_id: str) -> None:
    """It has an address, and its text does not deceive."""
    a_run(folder, "odd\x1b[0m\nname", run_id=run_id)
    server = serve(RunsOfFolder(folder))
    listed = {run["run_id"]: run for run in httpx.get(f"{server.url}api/runs").json()["runs"]}
    name = "odd\\x1b[0m\\nname"
    assert sorted(listed) == ["demo", name]
    assert (listed[name]["status"], "is not a printable name" in listed[name]["damage"]) == ("damaged", True)
    assert httpx.get(f"{server.url}api/runs/{name}").json()["run"]["global_step"] == 5


def bad_line(**fields: Any) -> Callable[[Path], None]:
    """Append an event with these fields, as JSON."""

    def write(run: Path) -> None:
        event = {"type": "TrainStepEnded", "run_id": run.name, "attempt": 1, "seq": 7, "time": 1.7e9, "rank": 0}
        event |= {"global_step": 6, "epoch": 0, "stage": "train", "loss": 1.0, "step_in_epoch": 6, "step_s": 0.1}
        text = json.dumps(event | fields).replace('"LONG"', "9" * 400).replace('"NAN"', "NaN")
        append(text.encode() + b"\n")(run)

    return write


def append(data: bytes) -> Callable[[Path], None]:
    def write(run: Path) -> None:
        with open(run / SEGMENT, "ab") as file:
            file.write(data)

    return write


def special(name: str, kind: str) -> Callable[[Path], None]:
    """Replace a part of the folder."""

    def write(run: Path) -> None:
        path = run / name
        if path.is_dir():
            path.rename(path.with_name("moved"))
        else:
            path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.write_text("not a folder")
        else:
            path.symlink_to(run.parent.parent / "private" / name if kind == "link" else "/dev/zero")

    return write


def sparse(run: Path) -> None:
    os.truncate(run / SEGMENT, 40 * 2**30)


def unreadable(run: Path) -> None:
    (run / SEGMENT).chmod(0)
    if os.access(run / SEGMENT, os.R_OK):  # root reads everything
        special(SEGMENT, "folder")(run)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "integer of 400 digits": (bad_line(global_step="LONG"), "line 7"),
    "step that is NaN": (bad_line(global_step="NAN"), "line 7"),
    "step beyond 64 bits": (bad_line(seq=2**64), "line 7"),
    "nested": (append(b'{"a":' * 100_000 + b"\n"), "line 7"),
    "not unicode": (append(b'\xff\xfe"\n'), "line 7"),
    "endless line": (append(b"x" * 20_000_000), "line 7: it is longer than 8,388,608 bytes"),
    "garbage": (append(b"x\n" * 200_000), "not an event"),
    "sparse": (sparse, "line 7: it is longer than 8,388,608 bytes"),
    "unreadable": (unreadable, SEGMENT),
    "fifo as segment": (special(SEGMENT, "fifo"), f"{SEGMENT}: it is a FIFO"),
    "folder as segment": (special(SEGMENT, "folder"), f"{SEGMENT}: it is a folder"),
    "link as segment": (special(SEGMENT, "link"), f"{SEGMENT}: it is a symbolic link"),
    "device as segment": (special(SEGMENT, "device"), f"{SEGMENT}: it is a symbolic link"),
    "fifo as next segment": (special("journal/00000000000000000050.jsonl", "fifo"), "50.jsonl, line 1: it is a FIFO"),
    "link as journal": (special("journal", "link"), "journal is a symbolic link instead of a folder"),
    "file as journal": (special("journal", "file"), "journal is a file instead of a folder"),
    "fifo as lock": (special("run.lock", "fifo"), "run.lock is a FIFO instead of a file"),
    "folder as lock": (special("run.lock", "folder"), "run.lock is a folder instead of a file"),
    "fifo as live.json": (special("live.json", "fifo"), "live.json is a FIFO instead of a file"),
    "fifo as arguments": (special("arguments.json", "fifo"), "arguments.json is a FIFO instead of a file"),
    "fifo as stored view": (special(STORE_NAME, "fifo"), f"{STORE_NAME} is a FIFO instead of a file"),
}


@pytest.fixture
def damaged(folder: Path) -> Iterator[Path]:
    """A run for each kind of damage beside ``demo``."""
    for name, (damage, _) in DAMAGES.items():
        damage(a_run(folder, name))
    yield folder
    for path in folder.glob(f"*/{SEGMENT}"):
        path.chmod(0o600) if path.is_file() else None


def test_a_damaged_run_disturbs_no_other(damaged: Path, process: Start) -> None:
    """Each is listed with its reason, and every request is answered."""
    served = process("-m", "trainer.cli.main", "watch", str(damaged), "--port", "0", STAGECAST_TOKEN=TOKEN)
    url = next(part for part in served.stdout.readline().split() if part.startswith("http")).partition("#")[0]
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}) as client:

        def get(path: str) -> httpx.Response:
            return client.get(path, timeout=60)

        wait_until(lambda: len(get("api/runs").json()["runs"]) == len(DAMAGES) + 1)
        listed = {run["run_id"]: run for run in get("api/runs").json()["runs"]}
        assert (listed.pop("demo")["status"], listed.keys()) == ("running", DAMAGES.keys())
        for name, (_, reason) in DAMAGES.items():
            assert (name, listed[name]["status"]) == (name, "damaged")
            assert reason in listed[name]["damage"], name
            assert damage_line(listed[name]["damage"]) in listed[name]["problems"]
            shown = get(f"api/runs/{name}").json()
            assert (name, shown["run"]["status"]) == (name, "damaged")
            assert reason in shown["run"]["damage"], name
            assert get("api/runs/demo").json()["series"]["train_loss"]["count"] == 20
        assert get("api/runs/unreadable/journal").status_code in (200, 409)
        assert get("api/runs/link as journal/journal").status_code == 409


def test_a_repaired_run_is_sound_again(folder: Path, serve: Serve) -> None:
    """In the list and in its view, without a restart of the server."""
    run = a_run(folder, "mended")
    (run / "journal").rename(run / "away")
    (run / "journal").symlink_to("away")
    url = f"{serve(RunsOfFolder(folder)).url}api/runs"

    def state() -> list[Any]:
        shown = httpx.get(f"{url}/mended").json()["run"]
        listed = next(one for one in httpx.get(url).json()["runs"] if one["run_id"] == "mended")
        return [shown["status"], listed["status"], shown["damage"] or listed["damage"]]

    wait_until(lambda: state()[:2] == ["damaged", "damaged"])
    (run / "journal").unlink()
    (run / "away").rename(run / "journal")
    wait_until(lambda: state() == ["lost", "lost", None])
    (run / "run.lock").unlink()
    os.mkfifo(run / "run.lock")
    wait_until(lambda: state()[:2] == ["damaged", "damaged"])
    (run / "run.lock").unlink()
    wait_until(lambda: state() == ["lost", "lost", None])


def test_reports_and_replays_name_the_damage(damaged: Path, tmp_path: Path) -> None:
    """An unreadable run is refused; of another the rest is there, and the exit code is 1."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "trainer.cli.main", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    for name in ("link as journal", "fifo as segment"):
        result = run("report", str(damaged / name))
        assert (result.returncode, "is damaged: journal" in result.stderr) == (1, True)
        assert "Traceback" not in result.stderr
        assert not (tmp_path / f"{name}.html").exists()
    result = run("report", str(damaged / "integer of 400 digits"))
    assert (result.returncode, "is damaged: journal/" in result.stderr) == (1, True)
    assert "the report contains the rest of it" in result.stderr
    assert (tmp_path / "integer of 400 digits.html").exists()
    for name, word in (("link as journal", "is damaged: "), ("integer of 400 digits", "line 7")):
        result = run("replay", str(damaged / name), "--to", "jsonl", "path=out.jsonl")
        assert (result.returncode, word in result.stderr, "Traceback" in result.stderr) == (1, True, False)


def test_the_page_shows_the_damage(damaged: Path, serve: Serve, visit: Any) -> None:
    """In the list, in the run's status, and with its reason; wild values draw nothing wrong and end no script."""
    expect = pytest.importorskip("playwright.sync_api").expect
    wild = damaged / "fifo as lock" / SEGMENT
    header = '"run_id":"fifo as lock","attempt":1,"rank":0,"epoch":4611686018427387904,"stage":"train"'
    lines = [
        f'{{"type":"TrainStepEnded",{header},"seq":7,"time":8e9,"global_step":9223372036854775807,"loss":1e308,'
        '"step_in_epoch":9223372036854775807,"step_s":1e308}',
        f'{{"type":"MetricsLogged",{header},"seq":8,"time":5e-324,"global_step":4611686018427387904,'
        '"metrics":{"a":1e308,"b":-1e308}}',
        f'{{"type":"WarningLogged",{header},"seq":9,"time":8e9,"global_step":5,"level":"warning","message":"wild"}}',
    ]
    with open(wild, "a") as file:
        file.write("\n".join(lines) + "\n")
    page = visit(serve(RunsOfFolder(damaged)).url, "#run=fifo%20as%20lock")
    expect(page.locator("#status")).to_have_attribute("data-status", "damaged")
    expect(page.locator("#status .word")).to_contain_text("damaged")
    expect(page.locator("#problems")).to_contain_text("run.lock is a FIFO instead of a file")
    expect(page.locator("#runs-list li", has_text="link as journal")).to_contain_text("⚠ damaged")
    expect(page.locator("#content")).not_to_contain_text("e+")  # no number is written by its digits
    for axis in ("time", "step"):
        page.select_option("#x", axis)
    page.goto(page.url.partition("#")[0] + "#run=link%20as%20journal")
    expect(page.locator("#problems")).to_contain_text("journal is a symbolic link instead of a folder")
    page.goto(page.url.partition("#")[0] + "#run=demo")
    expect(page.locator("#status")).to_have_attribute("data-status", "running")


def test_a_view_is_bounded_whatever_one_line_holds(story: Story) -> None:
    """Names, texts, bins and settings beyond the limits are cut first; others stay unchanged."""
    small = [story.started(), *story.steps(3), story.metrics(a=1.0)]
    assert trimmed(small) == small
    view = RunView()
    changes = Changes()
    huge = [
        story.started(arguments={"a": "x" * 10_000_000}, module="m" * 10_000),
        story(MetricsLogged, metrics={f"m{index}": 1.0 for index in range(300_000)}),
        story(MetricsLogged, metrics={"n" * 10_000: 1.0}),
        story(TextLogged, name="t", path="media/t.txt", text="x" * 5_000_000),
        story(HistogramLogged, name="h", counts=[1.0] * 300_000),
        story(RunEnded, status="failed", reason="r" * 5_000_000, traceback="t" * 5_000_000),
    ]
    view.add(trimmed(huge), changes)
    assert len(view.curves.series) <= MOST_SERIES
    assert changes.points.keys() <= view.curves.series.keys()
    assert len(msgspec.json.encode(view.snapshot())) < 2_000_000
    for _ in range(300):
        view.add(trimmed([story(WarningLogged, level="warning", message="m", exception="e" * 60_000)]))
    assert sum(entry.detail is not None for entry in view.log) == MAX_DETAILS


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "status": lambda view: view["run"].update(status="constructor"),
    "problems": lambda view: view["run"].update(problems={"length": 1}),
    "latest": lambda view: view["run"].update(latest={"train_loss": "<b>"}),
    "latest names": lambda view: view["run"].update(latest={"x" * 10**6: 1.0}),
    "arguments": lambda view: view["arguments"].update(a="x" * 10**6),
    "cursor": lambda view: view["curves"].update(cursor=-1),
    "time": lambda view: view["run"].update(updated=float("inf")),
    "name": lambda view: view["run"].update(module="m" * 10**6),
    "line": lambda view: view["log"].insert(0, {"seq": 1, "kind": "X", "level": "error"}),
    "level": lambda view: view["log"][0].update(level="constructor"),
    "media": lambda view: view["media"].append({"name": "a", "kind": "b", "path": [], "text": {}, "global_step": 1}),
    "rows": lambda view: view["histograms"].update(h=[{"step": "x", "low": 0, "high": 1, "counts": [1.0]}]),
    "checkpoint": lambda view: view["checkpoints"].update(x={"name": "x", "upload": {"state": "constructor"}}),
    "stage": lambda view: view["stages"].update(train_loss="constructor"),
    "odd": lambda view: view["curves"]["series"]["train_loss"].update(odd=[[0, "<b>"]]),
    "weights": lambda view: view["curves"]["series"]["train_loss"].update(weight=[2**62] * 10),
}


@pytest.mark.parametrize("spoil", WRONG.values(), ids=WRONG)
def test_a_stored_view_with_values_of_a_wrong_type_is_not_used(
    told: Told, spoil: Callable[[dict[str, Any]], Any]
) -> None:
    """The page shows them: a value that no view can have breaks a page of several runs."""
    told.start(10)
    write_view(told.path, read_view(told.path)[0])
    assert read_view(told.path)[1] == told.story.seq
    stored = msgspec.msgpack.decode((told.path / STORE_NAME).read_bytes())
    spoil(stored["view"])
    (told.path / STORE_NAME).write_bytes(msgspec.msgpack.encode(stored))
    view, since = read_view(told.path)
    assert (since, view.run.status, view.curves.series["train_loss"].count) == (0, "running", 10)


def test_settings_that_are_large_in_memory_are_not_kept(story: Story) -> None:
    """Although they are few bytes; a configuration of that size is kept."""
    empty = {"a": [[]] * 60_000}
    config = {f"layer{index}.width": index + 0.5 for index in range(8_000)}
    [event] = trimmed([story.started(arguments=empty, config=config)])
    assert event.arguments.keys() == {"(not shown)"}
    assert event.config == config


def test_the_problems_of_a_stored_view_are_those_of_the_journal(told: Told) -> None:
    """A list of all runs shows them, so a stranger's text must not be there."""
    told.start(10)
    view, _ = read_view(told.path)
    view.run.problems = ["x" * 60_000] * 100
    write_view(told.path, view)
    again, since = read_view(told.path)
    assert (again.run.problems, since) == ([], told.story.seq)


@pytest.mark.parametrize("spoil", ["columns", "points", "rows", "lines", "device", "link"])
def test_a_stored_view_that_a_stranger_made_is_not_used(told: Told, spoil: str) -> None:
    """Its parts do not fit each other, or it is not a file: the journal is read instead, and has everything."""
    told.start(10)
    view, _ = read_view(told.path)
    series = view.curves.series["train_loss"]
    if spoil == "columns":
        series.mean = series.mean[:3]
    elif spoil == "points":
        series.odd = [(10**9, "nan")]
    elif spoil == "rows":
        view.histograms = {"h": [HistogramStep(1, 0.0, 1.0, [1.0] * 1_000)] * 20}
    elif spoil == "lines":
        view.log = [view.log[0]] * (MAX_LINES + 1)
    write_view(told.path, view)
    if spoil in ("device", "link"):
        data = (told.path / STORE_NAME).read_bytes()
        (told.path / STORE_NAME).unlink()
        (told.path.parent / "elsewhere").write_bytes(data)
        (told.path / STORE_NAME).symlink_to("/dev/zero" if spoil == "device" else "../elsewhere")
    again, stored = read_view(told.path)
    assert stored == 0
    assert again.curves.series["train_loss"].count == 10
    write_view(told.path, again)
    assert not (told.path / STORE_NAME).is_symlink()
    assert read_view(told.path)[1] == told.story.seq


def test_nothing_in_a_stored_view_is_keyed_by_integers() -> None:
    """A stranger could choose integers whose known hashes collide, before anything is checked."""
    keyed: list[str] = []
    seen: set[str] = set()

    def look(kind: Any, path: str) -> None:
        if isinstance(kind, msgspec.inspect.DictType) and not isinstance(kind.key_type, msgspec.inspect.StrType):
            keyed.append(path)
        if isinstance(kind, msgspec.inspect.StructType):
            if kind.cls.__name__ in seen:
                return
            seen.add(kind.cls.__name__)
        for name in getattr(kind, "__struct_fields__", ()):
            value = getattr(kind, name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, msgspec.Struct):
                    look(part, f"{path}.{getattr(part, 'name', name)}")

    look(msgspec.inspect.type_info(RunView), "view")
    assert "Series" in seen
    assert keyed == []


def test_a_resume_that_contradicts_the_end_of_the_journal_is_read_once(told: Told) -> None:
    """Its ``seq`` is above all at the end, so it seems new each time."""
    tell = told.story
    told.start(3)
    tell.seq = 10**9
    told.write(tell(RunResumed, checkpoint="step-2.a1", after_seq=3))
    segment = told.path / SEGMENT
    lines = segment.read_bytes().splitlines(keepends=True)
    # Garbage, so that the reader does not see that the next lines are lower; and they fill what is read of the end.
    segment.write_bytes(b"".join(lines) + b"garbage\n" * 10 + lines[1] * 3_000)
    view, _ = read_view(told.path)
    assert (view.run.run_id, view.cursor) == ("demo", 10**9 + 1)


def test_a_folder_that_vanishes_while_it_is_read_is_not_an_error(told: Told) -> None:
    """Clients keep the last state."""
    told.start(10)
    hub = FolderHub(told.path)
    hub._read_if_due()
    shutil.rmtree(told.path)
    hub._looked_at = -1e9
    hub._read_if_due()
    assert (hub.view.curves.series["train_loss"].count, hub.view.run.damage) == (10, None)
