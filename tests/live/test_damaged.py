"""Run folders that a stranger has prepared, or that are damaged: no other run is disturbed, and no file is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from events.safe_files import UnsafeFile, open_below, stat_below
from sinks.live.runs import RunsOfFolder

SECRET = b"a-secret-of-the-user"
IMAGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0"
SEGMENT = "journal/00000000000000000001.jsonl"

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no special files")


@pytest.fixture
def folder(told: Any) -> Path:
    """The folder of the runs: ``demo`` runs, and beside the folder are secrets and a private run of the user."""
    tell = told.story
    told.write(tell.started(), *tell.steps(20))
    path: Path = told.path.parent
    (path.parent / "secret.png").write_bytes(SECRET)
    (path.parent / "private" / "media").mkdir(parents=True)
    (path.parent / "private" / "media" / "a.png").write_bytes(IMAGE + SECRET)
    (path.parent / "private" / "journal").mkdir()
    (path.parent / "private" / SEGMENT).write_bytes((told.path / SEGMENT).read_bytes().replace(b'"demo"', b'"private"'))
    return path


def a_run(folder: Path, kit: Any, name: str, *, run_id: str | None = None) -> Path:
    """A run that is over, with some steps."""
    told = kit.Told(folder / name, run_id or name)
    told.write(told.story.started(), *told.story.steps(5))
    told.let_go()
    path: Path = told.path
    return path


def links_as_media(run: Path) -> None:
    (run / "media").symlink_to(run.parent.parent / "private" / "media")


def linked_image(run: Path) -> None:
    (run / "media").mkdir()
    (run / "media" / "a.png").symlink_to(run.parent.parent / "private" / "media" / "a.png")


def linked_folder_of_images(run: Path) -> None:
    (run / "media").mkdir()
    (run / "media" / "sub").symlink_to(run.parent.parent / "private" / "media")


def secret_named_as_an_image(run: Path) -> None:
    (run / "media").mkdir()
    os.link(run.parent.parent / "secret.png", run / "media" / "a.png")


@pytest.mark.parametrize("prepare", [links_as_media, linked_image, linked_folder_of_images, secret_named_as_an_image])
def test_no_file_outside_a_run_is_shown_as_its_image(
    folder: Path, kit: Any, serve: Any, prepare: Callable[[Path], None]
) -> None:
    """Whichever part of the path is a link; a file that does not hold an image is not shown by its name alone."""
    run = a_run(folder, kit, "evil")
    prepare(run)
    server = serve(RunsOfFolder(folder))
    for name in ("a.png", "sub/a.png", "media/a.png", "media/sub/a.png"):
        answer = httpx.get(f"{server.url}api/runs/evil/media/{name}")
        assert (answer.status_code, SECRET in answer.content) == (404, False)
    (run / "media").unlink() if (run / "media").is_symlink() else None
    (run / "media").mkdir(exist_ok=True)
    (run / "media" / "b.gif").write_bytes(IMAGE)  # by its content, whatever its name
    answer = httpx.get(f"{server.url}api/runs/evil/media/b.gif")
    assert (answer.content, answer.headers["content-type"]) == (IMAGE, "image/png")


def test_a_run_folder_that_is_a_link_is_named_and_not_followed(folder: Path, serve: Any) -> None:
    """Also if an entry is exchanged for one later. A link to a neighbour is not listed."""
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


def test_a_run_cannot_take_the_place_of_another(folder: Path, kit: Any, serve: Any) -> None:
    """One that has another's ``run_id``, and is newer, gets a name of its own, and both name the other."""
    evil = kit.Told(folder / "evil", "demo")
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
def test_a_run_whose_id_is_not_a_name_is_listed_by_its_folder(folder: Path, kit: Any, serve: Any, run_id: str) -> None:
    """So that it has an address, and nothing that is shown of it deceives."""
    a_run(folder, kit, "odd\x1b[0m\nname", run_id=run_id)
    server = serve(RunsOfFolder(folder))
    listed = {run["run_id"]: run for run in httpx.get(f"{server.url}api/runs").json()["runs"]}
    name = "odd\\x1b[0m\\nname"
    assert sorted(listed) == ["demo", name]
    assert (listed[name]["status"], "is not a printable name" in listed[name]["damage"]) == ("damaged", True)
    assert httpx.get(f"{server.url}api/runs/{name}").json()["run"]["global_step"] == 5
