"""A sink that writes the metrics as a table, for pandas, spreadsheets and ``grep``."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

import msgspec

from events.errors import SinkMisconfigured
from events.messages import Event
from events.metrics import METRIC_TYPES, metrics_of
from events.sink import Delivery, RunInfo
from events.strict import Strict
from sinks.files.appended import (
    LINE_BYTES,
    AppendedFile,
    End,
    Position,
    Rows,
    check_path,
    find_end,
    newer,
    path_in,
    position_of,
    too_long,
    warn_of_another,
)

COLUMNS = ("run_id", "attempt", "seq", "time", "global_step", "epoch", "stage", "name", "value")
"""The columns: one row for each number."""

_HEADER = (",".join(COLUMNS) + "\n").encode()

# Not read by `csv`, which refuses fields of more than 131,072 characters; its limit is global to the process.
_TEXT = rb'(?:"[^"]*(?:""[^"]*)*"|[^",\r\n]*)'
_BEGIN = re.compile(rb'"|[^",\r\n]*,\d+,\d+,')
"""The start of a row; another line is the rest of a name with a line break."""
_UNSEEN = "[\0-\x08\x0b\x0c\x0e-\x20\x7f-\xa0\xad\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff]"
"""Spaces and invisible characters, which spreadsheets may strip; not a tab or a line break."""
_FORMULA = re.compile(
    f"^(?=[\t\r\n])|(?:^|(?<=[;\t\r\n]))(?={_UNSEEN}*[-=+@\u2212\ufe62\ufe63\ufe66\ufe6b\uff0b\uff0d\uff1d\uff20])"
)
"""The start of a possible formula in a spreadsheet: at the start of a cell, or after a separating semicolon, tab or
line break. The first four signs have wide and small forms."""
_ROW = re.compile(rb'(%b),"?(\d+)"?,"?(\d+)"?,"?([-+.\deE]+)"?,[^,]*,[^,]*,[^,]*,%b,[^,]*\n' % (_TEXT, _TEXT))
"""A row; another program may have quoted each column."""


class CSV(Strict, frozen=True):
    """Appends each metric to a table, under its name in `events.metrics.metrics_of`::

        Trainer(module, arguments, sinks=[CSV()]).train()
        table = pandas.read_csv("runs/RUN/metrics.csv")
        table[table.name == "val_loss"].plot(x="global_step", y="value")

    Its columns are ``run_id, attempt, seq, time, global_step, epoch, stage, name, value``; ``time`` is in Unix seconds,
    ``stage`` may be empty. NaN and infinities are ``nan``, ``inf`` and ``-inf``. A name that a spreadsheet may read as
    a formula (it begins with ``=``, ``+``, ``-`` or ``@``, perhaps after spaces, or with a tab or a line break) is
    prefixed with ``'``; numbers are not. A resumed run continues the table. Each row is written once and completely: a
    row that a killed process has torn is removed. Superseded steps stay in the table; ``attempt`` distinguishes them.
    Several runs may write to one file, one after the other; a second run of the same name is appended with a warning.
    The run folder has the hyperparameters, in ``arguments.json`` and ``config.json``. Histograms, images, sounds,
    tables and texts are skipped.
    """

    path: str | None = None
    """The file; None: ``metrics.csv`` in the run folder."""

    # Lossless, because a gap would only be noticed much later. Writes are retried for about seven minutes, because a
    # full disk stays full for minutes. A latency of half a second makes thousands of rows one write.
    delivery: ClassVar[Delivery] = Delivery(
        types=METRIC_TYPES, overflow="catch_up", latency_s=0.5, batch=8_192, timeout_s=30.0, retries=20
    )

    def __post_init__(self) -> None:
        check_path(self.path, "CSV(path")

    def open(self, run: RunInfo) -> CSVWriter:
        """Open the table, and find the position to continue from.

        Raises:
            SinkMisconfigured: There is no path, and the run has no folder; or the file is another table.
            OSError: The file cannot be opened, or another run has it open.
        """
        return CSVWriter(AppendedFile(path_in(run, self.path, "metrics.csv", "CSV"), run.run_dir), run.run_id)


class CSVWriter:
    """An open `CSV`. Only waits for the disk."""

    def __init__(self, file: AppendedFile, run_id: str) -> None:
        self._file = file
        try:
            _check_header(file)
            end = find_end(file, lambda lines: _rows(lines, run_id, file.path))
            file.cut(end.size)
            if not end.size:
                file.append(_HEADER)
        except BaseException:  # close the file first
            file.close()
            raise
        self._end: End | None = end  # until the first event shows whether the run continues the file
        self._last = end.last
        self._begun = end.rows  # rows of that event in the file, of which a killed process may have written a part

    def write(self, events: Sequence[Event]) -> None:
        """Append the rows that are not in the file yet. Raises `OSError` if the disk fails; nothing is added then."""
        if self._end is not None and events:
            if self._end.is_of_another(events[0]):
                warn_of_another("CSV", self._file.path, events[0].run_id)
                self._last, self._begun = (0, 0), 0
            self._end = None
        begun = [event for event in events if position_of(event) == self._last] if self._begun else []
        events = newer(events, self._last)
        if not events and not begun:
            return
        block = "".join([*_encode(begun)[self._begun :], *_encode(events)])
        self._file.append(block.encode("utf-8", "backslashreplace"))
        if events:
            self._last = position_of(events[-1])
        self._begun = 0

    def close(self) -> None:
        """Flush to the disk and close the file."""
        self._file.close()


def _encode(events: Sequence[Event]) -> list[str]:
    """The rows of events. The hot path: about 3 us per event with four metrics."""
    found = [(event, metrics) for event in events if (metrics := metrics_of(event))]
    numbers = [number for event, metrics in found for number in (event.time, *[value for _, value in metrics])]
    texts = iter(_texts(numbers))
    rows: list[str] = []
    for event, metrics in found:
        head = (
            f"{_quoted(event.run_id)},{event.attempt},{event.seq},{next(texts)},{event.global_step},{event.epoch},"
            f"{event.stage or ''},"
        )
        rows += [f"{head}{_quoted(name)},{text}\n" for (name, _), text in zip(metrics, texts, strict=False)]
    return rows


def _texts(numbers: list[float]) -> list[str]:
    """The shortest exact text of each number. One call of `msgspec` is seven times as fast as `repr`."""
    texts = msgspec.json.encode(numbers).decode()[1:-1].split(",")
    if "null" in texts:  # JSON has no NaN and no infinities
        return [repr(number) if text == "null" else text for number, text in zip(numbers, texts, strict=True)]
    return texts


@functools.lru_cache(maxsize=8_192)
def _quoted(text: str) -> str:
    """Quote a field as `csv` does. Cached, because there are few names and millions of rows.

    A carriage return is quoted, too (only newer Pythons do so): readers end a row at a bare one. So are a semicolon and
    a tab, which separate fields in some spreadsheets.
    """
    text = _FORMULA.sub("'", text)
    if any(char in text for char in ',;"\t\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _rows(lines: Iterable[bytes], run_id: str, path: str) -> Rows:
    whose = _FORMULA.sub("'", run_id).encode("utf-8", "backslashreplace")
    end = begin = 0
    row: list[bytes] = []  # the lines of a row, which continues while a quote is open
    is_open = False
    for line in lines:
        if not line.endswith(b"\n"):
            return  # torn
        end += len(line)
        if row or _BEGIN.match(line):
            row.append(line)
            is_open ^= line.count(b'"') % 2 == 1
        if end - begin > LINE_BYTES:
            raise too_long(path)
        if not is_open:
            yield _event_of(b"".join(row), whose), end
            row.clear()
            begin = end


def _event_of(row: bytes, whose: bytes) -> tuple[Position, float] | None:
    found = _ROW.fullmatch(row)
    if found is None or _unquoted(found[1]) != whose:
        return None
    try:
        return (int(found[2]), int(found[3])), float(found[4])
    except ValueError:
        return None


def _unquoted(field: bytes) -> bytes:
    return field[1:-1].replace(b'""', b'"') if field.startswith(b'"') else field


def _check_header(file: AppendedFile) -> None:
    with file.reader() as reader:
        found = reader.readline(len(_HEADER) + 2)
    if found.rstrip(b"\r\n") != _HEADER.rstrip() and not _HEADER.startswith(found):  # the header may be torn
        raise SinkMisconfigured(
            f"CSV cannot continue {file.path}, whose first line is {found[:80]!r} and not {_HEADER.decode().rstrip()};"
            f" move the file away, or name another path"
        )
