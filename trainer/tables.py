"""Tables that a module logs, stored as JSON."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import msgspec
import torch

from events.messages import TableCell
from trainer.device_copy import DeviceCopy

MOST_ROWS = 1_000
"""Maximum rows per table; further ones are cut, and counted in the table."""
MOST_COLUMNS = 64
"""Maximum columns per table."""
MOST_CHARS = 1_000
"""Maximum characters per cell and per column name; the rest is cut."""
_MOST_EXACT = 2**53  # larger integers are stored as text: readers of JSON may round them


class EncodedTable(NamedTuple):
    """An encoded `Table`."""

    data: bytes
    columns: list[str]
    rows: int
    """Rows in the file."""
    cut: str | None
    """The missing part, in words."""


class Table:
    """Rows of values, for `ModuleInterface.log`; stored as JSON ``{"columns": [...], "rows": [[...]], "cut": ...}``::

        self.log("predictions", Table(["text", "label", "score"], rows))
        self.log("predictions", Table({"text": texts, "score": scores}))

    A cell is a number, a text, a bool or None; a tensor of one element on any device, which is read later; or any other
    object as its text. NaN and infinities are stored as the texts ``NaN``, ``Infinity`` and ``-Infinity``. The first
    `MOST_ROWS` rows and `MOST_CHARS` characters of a cell are kept; the table says how many are cut. The values are
    copied at once: the original may be changed afterwards.

    Args:
        columns: The names of the columns, for ``rows``; or a dict of columns, each a list, array or tensor of equal
            lengths; or a pandas DataFrame, whose missing values, NaN among them, are None.
        rows: Sequences with one cell for each column.

    Raises:
        TypeError: Something is not a row, a column or a name, or has no text.
        ValueError: The rows or columns differ in length, there are none, or too many columns.
    """

    def __init__(self, columns: Any, rows: Iterable[Sequence[object]] | None = None) -> None:
        names, kept, total = _split(columns, rows)
        if not names:
            raise ValueError("Table() got no columns; pass their names, or a dict of columns")
        if len(names) > MOST_COLUMNS:
            raise ValueError(f"Table() got {len(names):,} columns, of at most {MOST_COLUMNS}; drop some of them")
        self._columns = [_text(name, f"column {number}")[:MOST_CHARS] for number, name in enumerate(names, 1)]
        self._total = total
        self._long = 0
        # A tensor of a column is copied at once, instead of each of its elements.
        found = enumerate(columns.values()) if rows is None and isinstance(columns, Mapping) else ()
        self._tensors = {at: DeviceCopy(one[:MOST_ROWS]) for at, one in found if isinstance(one, torch.Tensor)}
        self._rows = [
            [self._cell(value, f"row {at}, column {name!r}") for name, value in zip(self._columns, row, strict=True)]
            for at, row in enumerate(kept, 1)
        ]
        cells = itertools.chain.from_iterable(self._rows)
        self.nbytes = sum(4 * len(cell) if isinstance(cell, str) else 32 for cell in cells)
        self.nbytes += sum(tensor.nbytes for tensor in self._tensors.values())

    def _cell(self, value: object, where: str) -> TableCell | DeviceCopy:
        if isinstance(value, torch.Tensor):
            if value.numel() != 1 or value.layout is not torch.strided:
                raise ValueError(
                    f"Table() got a tensor of shape {tuple(value.shape)} in {where}; pass one element, or its text"
                )
            return DeviceCopy(value.reshape(()))
        return self._plain(value, where)

    def _plain(self, value: object, where: str) -> TableCell:
        item = getattr(value, "item", None)  # of a NumPy number
        if callable(item) and getattr(value, "shape", None) == ():
            value = item()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int) and abs(value) <= _MOST_EXACT:
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else _NON_FINITE.get(value, "NaN")
        text = _text(value, where)
        if len(text) > MOST_CHARS:
            self._long += 1
        return text[:MOST_CHARS]

    def encode(self) -> EncodedTable:
        """The table as JSON. Waits for the device of its tensors, so it must not run on the loop's thread."""
        rows = [
            [self._plain(cell.read().item(), "") if isinstance(cell, DeviceCopy) else cell for cell in row]
            for row in self._rows
        ]
        for at, tensor in self._tensors.items():
            for row, value in zip(rows, tensor.read().tolist(), strict=True):
                row[at] = self._plain(value, "")
        missing = [
            f"the first {len(rows):,} of {self._total:,} rows" if self._total > len(rows) else "",
            f"the first {MOST_CHARS:,} characters of {self._long:,} cells" if self._long else "",
        ]
        cut = " and ".join(filter(None, missing)) or None
        data = msgspec.json.encode({"columns": self._columns, "rows": rows, "cut": cut})
        return EncodedTable(data, self._columns, len(rows), cut)


_NON_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


def is_frame(value: object) -> bool:
    """Whether it is a pandas DataFrame, or looks like one."""
    return hasattr(value, "itertuples") and hasattr(value, "columns")


def _split(columns: Any, rows: Any) -> tuple[list[object], list[Sequence[object]], int]:
    """Return the names, the kept rows, and the number of all rows."""
    if rows is None and is_frame(columns):
        some = columns.head(MOST_ROWS).astype(object)  # where None can be the missing value of any column
        kept = some.where(some.notna(), None).itertuples(index=False, name=None)
        return list(columns.columns), list(kept), len(columns)
    if rows is None and isinstance(columns, Mapping):
        lengths = {_text(name, "a column's name"): _length(name, column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} {length:,}" for name, length in itertools.islice(lengths.items(), 5))
            raise ValueError(f"Table() got columns of different lengths ({told}); make them equal")
        total = max(lengths.values(), default=0)
        count = min(total, MOST_ROWS)
        cells = [[None] * count if isinstance(one, torch.Tensor) else one[:count] for one in columns.values()]
        return list(columns), list(zip(*cells, strict=True)), total
    if rows is None or isinstance(columns, str) or not isinstance(columns, Iterable):
        raise TypeError(f"Table() got {columns!r:.80}; pass column names and rows, a dict of columns, or a DataFrame")
    if not isinstance(rows, Iterable) or isinstance(rows, str):
        raise TypeError(f"Table() got {rows!r:.80} as rows; pass a list of rows")
    names, all_rows = list(columns), list(rows)
    for number, row in enumerate(all_rows, 1):
        if not isinstance(row, Sized | Sequence) or isinstance(row, str | bytes | Mapping):
            raise TypeError(f"Table() got {row!r:.80} as row {number:,}; pass a list of cells")
        if len(row) != len(names):
            raise ValueError(f"Table() got {len(row):,} cells in row {number:,} for {len(names):,} columns; add None")
    return names, all_rows[:MOST_ROWS], len(all_rows)


def _length(name: object, column: Any) -> int:
    is_column = isinstance(column, Sequence | torch.Tensor) or hasattr(column, "__array__")
    if not is_column or isinstance(column, str | bytes) or getattr(column, "ndim", 1) != 1:
        raise TypeError(f"Table() got {column!r:.80} as column {name!r:.80}; pass a list, or rows and column names")
    return len(column)


def _text(value: object, where: str) -> str:
    try:
        return str(value).encode("utf-8", "backslashreplace").decode()  # JSON has no lone surrogates
    except Exception as error:  # of the user's object
        problem = f"Table() cannot print {type(value).__name__} in {where} ({type(error).__name__}); pass its text"
        raise TypeError(problem) from error
