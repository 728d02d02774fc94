"""One HTML file with the page and its runs, which needs no server."""

from __future__ import annotations

import base64
import html
import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from events.errors import RunFolderError
from events.journal.segment import JOURNAL_DIR, segment_numbers
from events.run.copy import is_pushed
from events.run.damage import damage_of, reason_of
from events.run.folder import is_held
from events.safe_files import replace_below
from sinks.live.frames import encode
from sinks.live.images import open_image
from sinks.live.stored import read_view
from sinks.live.view import RunView

_PAGE = Path(__file__).with_name("page")
MOST_MEDIA_BYTES = 32 * 2**20
"""Maximum bytes of images per report; the oldest images are skipped beyond it."""
# The file makes no requests, and neither can the content of an untrusted run.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:;"
    " connect-src data:; base-uri 'none'; form-action 'none'"
)

_SAFE = " !\"$&'()*+,-./:;<=>?@[\\]^_`{|}~"
"""Characters of a module that a data address may have as they are, so that the document compresses well."""


def write_report(
    run_dirs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    on_damage: Callable[[Path, str], None] = lambda run_dir, reason: None,
) -> int:
    """Write a report of one or more runs, which the page can overlay; return its size in bytes.

    The file is written atomically. A folder that is given twice appears once.

    Args:
        on_damage: Called with the reason for each folder that was read in part. The report names the damage too.

    Raises:
        RunFolderError: A folder is not a run folder, is unreadable, or two have the same ``run_id``.
        OSError: The file cannot be written.
    """
    runs: list[dict[str, object]] = []
    media: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for run_dir in {path.resolve(): path for path in map(Path, run_dirs)}.values():
        view = _view(run_dir)
        if view.run.damage is not None:
            on_damage(run_dir, view.run.damage)
        run_id = view.run.run_id
        if run_id in folders:
            # The page identifies runs by name, and would show one of the two.
            raise RunFolderError(
                f"{folders[run_id]} and {run_dir} are both of the run {run_id!r}; leave one out, or write a"
                " report of each"
            )
        folders[run_id] = run_dir
        runs.append(view.snapshot())
        media.update(_media(run_dir, view))
    data = encode({"runs": runs, "media": media})
    path = Path(out)
    return replace_below(path.parent, path.name, document(data).encode("utf-8", "surrogatepass"))


def _view(run_dir: Path) -> RunView:
    try:
        if damage_of(run_dir) is None and not segment_numbers(run_dir / JOURNAL_DIR):
            raise RunFolderError(f"{run_dir} is not a folder of a run with a journal")
    except OSError as error:
        raise RunFolderError(f"{run_dir} is damaged: {reason_of(error, run_dir)}") from error
    view, _ = read_view(run_dir)
    if not view.run.run_id:
        raise RunFolderError(f"{run_dir} is damaged: {view.run.damage or 'no line of its journal is an event'}")
    view.run.settle(is_held=is_held(run_dir), is_pushed=is_pushed(run_dir))
    return view


def _media(run_dir: Path, view: RunView) -> dict[str, str]:
    """Return the images, the newest first, by their address on the page."""
    found: dict[str, str] = {}
    room = MOST_MEDIA_BYTES
    run_id = view.run.run_id
    for one in reversed(view.media):
        path = str(one.path)
        if one.kind != "image" or not path.startswith("media/") or f"{run_id}/{path}" in found:
            continue
        try:
            image = open_image(run_dir, path)
        except (OSError, ValueError):  # deleted, or not an image of the run
            continue
        with image.file:
            room -= image.size
            if room < 0:
                break
            found[f"{run_id}/{path}"] = f"data:image/png;base64,{_base64(image.file.read(image.size))}"
    return found


def document(data: bytes) -> str:
    """Return the page with its modules, styles and data inline.

    Args:
        data: JSON, as `connection.js` reads it: ``{"runs": [snapshot, ...], "media": {address: data address}}``.
    """
    page = (_PAGE / "index.html").read_text("utf-8")
    modules = {path.name: path.read_text("utf-8") for path in _PAGE.glob("*.js") if "iife" not in path.name}
    imports = {
        f"stagecast/{name}": f"data:text/javascript,{urllib.parse.quote(_with_names(text), safe=_SAFE)}"
        for name, text in modules.items()
    }
    head = (
        f'<meta http-equiv="content-security-policy" content="{html.escape(_POLICY)}">\n'
        f'<script type="application/json" id="report">{inert(data.decode())}</script>\n'
        f"{_script((_PAGE / 'uPlot.iife.min.js').read_text('utf-8'))}\n"
        f'<script type="importmap">{inert(msgspec.json.encode({"imports": imports}).decode())}</script>\n'
    )
    styles = "".join(
        f"<style>\n{(_PAGE / name).read_text('utf-8')}\n</style>\n" for name in ("uPlot.min.css", "live.css")
    )
    page = re.sub(r'<link rel="stylesheet"[^>]*>\n?', "", page)
    page = re.sub(r"<script [^>]*src=[^>]*></script>\n?", "", page)
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{head}{styles}', 1)
    return page.replace("</body>", '<script type="module">import "stagecast/live.js";</script>\n</body>', 1)


def _with_names(module: str) -> str:
    """Replace relative imports by names of the import map: a data address has no relative addresses."""
    return re.sub(r'(from\s+|import\s+)"\./([\w.]+)"', r'\1"stagecast/\2"', module)


def _script(text: str) -> str:
    return f"<script>{text.replace('</script', '<' + chr(92) + '/script')}</script>"


def inert(json: str) -> str:
    """Escape JSON so that it neither ends a script element nor opens a comment."""
    return json.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
