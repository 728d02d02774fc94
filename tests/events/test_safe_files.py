"""Files below a folder that a stranger may have prepared."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from events.safe_files import (
    UnsafeFile,
    list_below,
    make_folder_below,
    open_below,
    read_below,
    replace_below,
    stat_below,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links are found by looking first there")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with ``sub/file``, beside a secret."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "file").write_text("away")
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "file").write_text("ours")
    return folder


def test_a_regular_file_is_read_whole(root: Path) -> None:
    """Also through a link to the folder itself, which is the user's choice, and up to the limit exactly."""
    (root.parent / "link").symlink_to(root)
    assert read_below(root.parent / "link", "sub/file", 4) == b"ours"
    with pytest.raises(UnsafeFile, match="larger than 3 bytes"):
        read_below(root, "sub/file", 3)
    fd = open_below(root, "sub/file")
    assert os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_an_entry_that_is_removed_while_a_folder_is_listed_is_not_in_the_list(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked later, it would look for its name by a descriptor that is another folder's by then."""
    (root / "sub" / "gone").write_text("")
    scan = os.scandir

    class Scan:
        def __init__(self, folder: int) -> None:
            self._entries = scan(folder)

        def __enter__(self) -> list[os.DirEntry[str]]:
            entries = list(self._entries)
            (root / "sub" / "gone").unlink()
            return entries

        def __exit__(self, *exc_info: object) -> None:
            self._entries.close()

    monkeypatch.setattr("events.safe_files.os.scandir", Scan)
    assert [entry.name for entry in list_below(root, "sub")] == ["file"]


@pytest.mark.parametrize("place", ["last", "parent", "dangling"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_RDWR | os.O_APPEND])
def test_no_link_is_followed(root: Path, place: str, flags: int) -> None:
    """Whatever it leads to is neither read, nor created, nor changed."""
    name = "sub/link" if place != "parent" else "link/file"
    target = {"last": "../../secret", "parent": "../away", "dangling": "../../new"}[place]
    (root / name.partition("link")[0] / "link").symlink_to(target)
    with pytest.raises(UnsafeFile, match="a symbolic link"):
        open_below(root, name, flags)
    assert (root.parent / "secret").read_text() == "secret"
    assert (root.parent / "away" / "file").read_text() == "away"
    assert not (root.parent / "new").exists()
    if place == "parent":
        for use in (lambda: replace_below(root, name, b""), lambda: stat_below(root, name)):
            with pytest.raises(UnsafeFile):
                use()
        for use in (lambda: list_below(root, "link"), lambda: make_folder_below(root, "link")):
            with pytest.raises(UnsafeFile):
                use()


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "device"])
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_a_special_file_is_refused_at_once(root: Path, kind: str, flags: int) -> None:
    """A FIFO without a peer would block for ever."""
    path = root / "special"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as peer:
            os.chdir(root)
            peer.bind("special")
    elif kind == "folder":
        path.mkdir()
    else:
        root, path = Path("/dev"), Path("/dev/zero")
        if not path.is_char_device():
            pytest.skip("there is no device")
    with pytest.raises(OSError, match=r"FIFO|socket|folder|device|directory"):
        open_below(root, path.name, flags)


def test_a_file_with_several_names_is_not_written(root: Path) -> None:
    """The other name may be one of the user's files."""
    os.link(root.parent / "secret", root / "hard")
    with pytest.raises(UnsafeFile, match="2 hard links"):
        open_below(root, "hard", os.O_WRONLY | os.O_TRUNC)
    replace_below(root, "hard", b"ours")
    assert (root.parent / "secret").read_text() == "secret"
    assert read_below(root, "hard", 9) == b"ours"


def test_a_replaced_file_is_new_and_leaves_no_temporary(root: Path) -> None:
    """A link in its place is replaced, not followed; the temporary file cannot be prepared by a stranger."""
    (root / "link").symlink_to("../secret")
    replace_below(root, "link", b"new")
    assert not (root / "link").is_symlink()
    assert (root.parent / "secret").read_text() == "secret"
    with pytest.raises(OSError, match="directory"):
        replace_below(root, "sub", b"new")
    assert sorted(os.listdir(root)) == ["link", "sub"]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "", ".", "a\0b"])
def test_a_path_that_leads_out_is_refused(root: Path, name: str) -> None:
    """By its text already."""
    with pytest.raises(ValueError, match="not a path below a folder"):
        open_below(root, name)


def test_folders_are_made_and_listed_without_following(root: Path) -> None:
    """Entries keep their own status; a missing file is the usual error."""
    make_folder_below(root, "sub")
    make_folder_below(root, "sub/inner")
    (root / "sub" / "link").symlink_to("file")
    entries = list_below(root, "sub")
    assert [(entry.name, entry.is_symlink()) for entry in entries] == [
        ("file", False),
        ("inner", False),
        ("link", True),
    ]
    assert stat_below(root, "sub/link").st_size == 4
    assert entries[0].stat(follow_symlinks=False).st_size == 4
    with pytest.raises(FileNotFoundError, match="missing"):
        open_below(root, "sub/missing")
    with pytest.raises(NotADirectoryError):
        make_folder_below(root, "sub/file")


def test_a_name_that_is_exchanged_meanwhile_makes_no_difference(root: Path) -> None:
    """A thread exchanges a folder for a link to another one, as fast as it can."""
    (root / "other").symlink_to("../away")
    ended = threading.Event()

    def exchange() -> None:
        while not ended.is_set():
            for one, other in (("sub", "kept"), ("other", "sub"), ("sub", "other"), ("kept", "sub")):
                os.rename(root / one, root / other)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        read = 0
        for _ in range(2_000):
            try:
                assert read_below(root, "sub/file", 9) == b"ours"
                read += 1
            except (UnsafeFile, FileNotFoundError, NotADirectoryError):
                pass
        assert read
    finally:
        ended.set()
        thread.join()
