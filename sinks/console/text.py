"""Styled text before it has a width or colours: spans, lines, and how they are cut and wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from sinks.format import cells


class Span(NamedTuple):
    """Printable text in one style. The styles are names that the writer's palette translates."""

    text: str
    style: str = ""


Kind = Literal["note", "epoch", "good", "warn", "bad"]
Field = tuple[Span, ...]


class Line(NamedTuple):
    """One permanent line. Its fields are separated by two spaces and preferably not broken."""

    time: float
    kind: Kind
    fields: list[Field]

    @property
    def text(self) -> str:
        """The line without styles."""
        return "  ".join("".join(span.text for span in field) for field in self.fields)


def crop(spans: list[Span], width: int) -> list[Span]:
    """Cut a row off at a width, in cells."""
    kept: list[Span] = []
    for span in spans:
        room = width - sum(cells(s.text) for s in kept)
        if cells(span.text) <= room:
            kept.append(span)
            continue
        text = span.text[: max(0, room)]
        while cells(text) > room:  # wide characters take two columns
            text = text[:-1]
        kept.append(Span(text, span.style))
        break
    return kept


def wrap(line: Line, width: int) -> list[list[Span]]:
    """Break a line between its fields; a field that is itself too long, between its words."""
    rows: list[list[Span]] = [[]]
    used = 0
    for field in line.fields:
        # What would fit a row of its own is not torn apart.
        fits = _size(field) <= width
        pieces = [field] if fits else [(word,) for span in field for word in _words(span, width)]
        for index, piece in enumerate(pieces):
            gap = 0 if not rows[-1] else 2 if index == 0 else 1
            if rows[-1] and used + gap + _size(piece) > width:
                rows.append([])
                used = gap = 0
            rows[-1] += [Span(" " * gap), *piece]
            used += gap + _size(piece)
    return rows


def _size(field: Field) -> int:
    return sum(cells(span.text) for span in field)


def _words(span: Span, width: int) -> Iterable[Span]:
    """The words of a text, those longer than a row in parts."""
    for word in span.text.split(" "):
        while cells(word) > width:
            part = crop([Span(word)], width)[0].text
            yield Span(part, span.style)
            word = word[len(part) :]
        yield Span(word, span.style)
