from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from events.messages import StallLedger
from sinks.format import (
    cells,
    format_bytes,
    format_clock,
    format_duration,
    format_ledger,
    format_number,
    format_rate,
    ledger_shares,
)


@pytest.mark.parametrize(
    ("format_one", "value", "text"),
    [
        (format_duration, math.nan, "?"),
        (format_duration, math.inf, "?"),
        (format_duration, -1.0, "?"),
        (format_duration, 0.0, "0 ms"),
        (format_duration, 0.00032, "320 us"),
        (format_duration, 0.00099999, "1 ms"),
        (format_duration, 0.9996, "1.0 s"),
        (format_duration, 9.94, "9.9 s"),
        (format_duration, 9.96, "10 s"),
        (format_duration, 59.6, "1m 00s"),
        (format_duration, 3_599.6, "1h 00m"),
        (format_duration, 86_399.7, "1d 00h"),
        (format_duration, 90_000.0, "1d 01h"),
        (format_number, math.nan, "nan"),
        (format_number, -math.inf, "-inf"),
        (format_number, 0.0, "0.0000"),
        (format_number, 2.34567, "2.3457"),
        (format_number, 9.99999, "10.000"),
        (format_number, 12.3456, "12.346"),
        (format_number, 999.999, "1000.0"),
        (format_number, 12_345.67, "12345.7"),
        (format_number, 1.5e9, "1.500e+09"),
        (format_number, 0.00001, "1.000e-05"),
        (format_number, -2.5, "-2.5000"),
        (format_rate, math.nan, "?"),
        (format_rate, 0.0, "?"),
        (format_rate, 0.25, "4.0 s/step"),
        (format_rate, 48.24, "48.2 steps/s"),
        (format_rate, 4_512.3, "4512 steps/s"),
        (format_clock, math.nan, "--:--:--"),
        (format_clock, math.inf, "--:--:--"),
        (format_clock, 1e30, "--:--:--"),
        (format_bytes, 0, "0 B"),
        (format_bytes, 812, "812 B"),
        (format_bytes, 999, "999 B"),
        (format_bytes, 1_000, "1.0 kB"),
        (format_bytes, 1_540_000, "1.5 MB"),
        (format_bytes, 42e6, "42 MB"),
        (format_bytes, 3.1e9, "3.1 GB"),
    ],
)
def test_a_value_never_carries_into_a_unit_or_a_width_that_is_not_shown(
    format_one: Callable[[float], str], value: float, text: str
) -> None:
    """No ``60 s``, no ``1000 ms``, nothing negative; losses align in columns; an impossible time is not an error."""
    assert format_one(value) == text


def test_cells_are_columns_and_not_characters() -> None:
    """Wide characters take two, combining ones none."""
    assert [cells(text) for text in ("abc", "検証", "e\u0301", "")] == [3, 4, 1, 0]


def test_the_ledger_is_a_table_that_adds_up() -> None:
    """Every row of the wall, and device idle time apart from them."""
    ledger = StallLedger(wall_s=60.0, compute_s=54.0, data_s=3.0, publish_s=2.5, other_s=0.5, steps=1_200)
    assert format_ledger(ledger).splitlines() == [
        "loop time       seconds  percent",
        "compute          54.000   90.0 %",
        "contention        0.000    0.0 %",
        "data              3.000    5.0 %",
        "readback          0.000    0.0 %",
        "publish           2.500    4.2 %",
        "inline hooks      0.000    0.0 %",
        "fences            0.000    0.0 %",
        "backpressure      0.000    0.0 %",
        "checkpoint        0.000    0.0 %",
        "paused            0.000    0.0 %",
        "other             0.500    0.8 %",
        "wall             60.000  100.0 %",
        "per step          50 ms  1,200 steps",
    ]
    assert ledger_shares(ledger) == [
        ("compute", "90.0 %"),
        ("data", "5.0 %"),
        ("publish", "4.2 %"),
        ("other", "0.8 %"),
    ]
    on_device = StallLedger(wall_s=60.0, compute_s=60.0, device_idle_s=6.0)
    assert "(device idle      6.000   10.0 %)" in format_ledger(on_device)
    assert ledger_shares(on_device)[-1] == ("device idle", "10.0 %")


def test_the_ledger_has_every_row_of_the_struct() -> None:
    """A row that is added to the struct must not be missing from the table."""
    names = [name for name in StallLedger.__struct_fields__ if name not in {"wall_s", "steps", "device_idle_s"}]
    ledger = StallLedger(wall_s=float(len(names)), **dict.fromkeys(names, 1.0))  # type: ignore[arg-type]
    assert len(ledger_shares(ledger)) == len(names)


def test_an_empty_ledger_is_not_an_error() -> None:
    """A run that was cancelled before its first step has one."""
    assert "-" in format_ledger(StallLedger())
    assert ledger_shares(StallLedger()) == []
