"""Printed pages, as a reader of PDF finds them."""

from __future__ import annotations

import io
import itertools
from typing import Any, NamedTuple

import pytest

DEVICE_DPI = 300
"""Of the coordinates in which Chromium draws a page."""


class Box(NamedTuple):
    """A rectangle on a page, in points, from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float


class Printed(NamedTuple):
    """A page."""

    width: float
    height: float
    charts: list[Box]
    """Canvases: one that is divided between two pages is on both."""


def printed(data: bytes) -> list[Printed]:
    """Return the pages of a PDF by Chromium."""
    pypdf = pytest.importorskip("pypdf")
    reader = pypdf.PdfReader(io.BytesIO(data))
    pages = []
    for page in reader.pages:
        clips: set[Box] = set()
        _walk(reader, page.get_contents(), page["/Resources"], clips)
        pages.append(Printed(float(page.mediabox.width), float(page.mediabox.height), _outermost(clips)))
    return pages


def _outermost(clips: set[Box]) -> list[Box]:
    """Return the large clips of a page that lie in no other one, its own excepted: a canvas clips its plot again."""
    large = [one for one in clips if one.right - one.left > 100 and one.bottom - one.top > 50]
    inner = [one for one in large if one.bottom - one.top < 500]
    return [one for one in inner if not any(one != other and _holds(other, one) for other in inner)]


def _holds(outer: Box, inner: Box) -> bool:
    before = outer.left <= inner.left + 1 and outer.top <= inner.top + 1
    return before and outer.right >= inner.right - 1 and outer.bottom >= inner.bottom - 1


def _walk(reader: Any, stream: Any, resources: Any, clips: set[Box]) -> None:
    from pypdf.generic import ContentStream

    operations = ContentStream(stream, reader).operations
    for (values, operator), (_, following) in itertools.pairwise(operations):
        if operator == b"Do" and values[0] in resources.get("/XObject", {}):
            inner = resources["/XObject"][values[0]].get_object()
            if inner["/Subtype"] == "/Form":
                _walk(reader, inner, inner.get("/Resources", resources), clips)
        if operator == b"re" and following in (b"W", b"W*"):
            x, y, width, height = (float(value) * 72 / DEVICE_DPI for value in values)
            clips.add(Box(x, y, x + width, y + height))
