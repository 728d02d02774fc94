"""The page as one document, with its modules, styles and data inline: for a file, or a frame of a notebook."""

from __future__ import annotations

import html
import re
import urllib.parse
from pathlib import Path

import msgspec

_PAGE = Path(__file__).with_name("page")
UNPACK = "unpack.js"
"""The script of packed documents (`sinks.live.report_file`); the others are modules."""
_LIBRARY = "uPlot.iife.min.js"
# The document makes no requests, and neither can the content of an untrusted run.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:;"
    " media-src data: blob:; connect-src data:; base-uri 'none'; form-action 'none'"
)
_SAFE = " !\"$&'()*+,-./:;<=>?@[\\]^_`{|}~"
"""Characters of a module that a data address may have as they are, so that the document compresses well."""


def document(data: bytes) -> str:
    """Return the page with its modules, styles and data inline.

    Args:
        data: JSON, as `embedded.js` reads it: ``{"runs": [snapshot, ...], "media": {address: data address}}``.
    """
    imports = {
        f"stagecast/{name}": f"data:text/javascript,{urllib.parse.quote(text, safe=_SAFE)}"
        for name, text in modules().items()
    }
    head = (
        f'<script type="application/json" id="report">{inert(data.decode())}</script>\n'
        f"<script>{library().replace('</script', '<' + chr(92) + '/script')}</script>\n"
        f'<script type="importmap">{inert(msgspec.json.encode({"imports": imports}).decode())}</script>\n'
    )
    page = page_without_scripts().replace("</head>", f"{head}</head>", 1)
    return page.replace("</body>", '<script type="module">import "stagecast/live.js";</script>\n</body>', 1)


def modules() -> dict[str, str]:
    """Return the page's modules by their names, which import each other by the names ``stagecast/NAME``."""
    return {
        # A data address has no relative addresses.
        path.name: re.sub(r'(from\s+|import\s+)"\./([\w.]+)"', r'\1"stagecast/\2"', path.read_text("utf-8"))
        for path in _PAGE.glob("*.js")
        if path.name not in (_LIBRARY, UNPACK)
    }


def library() -> str:
    """Return the library that is not a module."""
    return (_PAGE / _LIBRARY).read_text("utf-8")


def page_without_scripts() -> str:
    """Return the page with its styles inline, and a policy under which it makes no requests."""
    page = (_PAGE / "index.html").read_text("utf-8")
    page = re.sub(r'<link rel="stylesheet"[^>]*>\n?', "", page)
    page = re.sub(r"<script [^>]*src=[^>]*></script>\n?", "", page)
    page = re.sub(r'<p class="unstyled">.*?</p>\n?', "", page)
    sheets = ((_PAGE / name).read_text("utf-8") for name in ("uPlot.min.css", "live.css"))
    styles = "".join(f"<style>\n{sheet}\n</style>\n" for sheet in sheets)
    policy = f'<meta http-equiv="content-security-policy" content="{html.escape(_POLICY)}">\n'
    return page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{policy}{styles}', 1)


def inert(json: str) -> str:
    """Escape JSON so that it neither ends a script element nor opens a comment."""
    return json.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
