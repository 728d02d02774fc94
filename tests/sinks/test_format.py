from __future__ import annotations

import math

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
    ("seconds", "text"),
    [
        (math.nan, "?"),
        (math.inf, "?"),
        (-1.0, "?"),
        (0.0, "0 ms"),
        (0.00032, "320 us"),
        (0.00099999, "1 ms"),
        (0.9996, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1m 00s"),
        (3_599.6, "1h 00m"),
        (86_399.7, "1d 00h"),
        (90_000.0, "1d 01h"),
    ],
)
def test_a_duration_never_carries_into_a_unit_it_does_not_show(seconds: float, text: str) -> None:
    """No ``60 s``, no ``1000 ms``, nothing negative."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (0.0, "0.0000"),
        (2.34567, "2.3457"),
        (9.99999, "10.000"),
        (12.3456, "12.346"),
        (999.999, "1000.0"),
        (12_345.67, "12345.7"),
        (1.5e9, "1.500e+09"),
        (0.00001, "1.000e-05"),
        (-2.5, "-2.5000"),
    ],
)
def test_a_number_keeps_its_width(value: float, text: str) -> None:
    """Five digits, wherever the point is, so that losses align in columns."""
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [(math.nan, "?"), (0.0, "?"), (0.25, "4.0 s/step"), (48.24, "48.2 steps/s"), (4_512.3, "4512 steps/s")],
)
def test_a_rate_is_readable_for_fast_and_slow_steps(rate: float, text: str) -> None:
    """A step that takes minutes has seconds per step."""
    assert format_rate(rate) == text


@pytest.mark.parametrize("unix_s", [math.nan, math.inf, 1e30])
def test_an_impossible_time_is_not_an_error(unix_s: float) -> None:
    """A clock that is broken must not break the display of what it timed."""
    assert format_clock(unix_s) == "--:--:--"


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


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (1_540_000, "1.5 MB"),
        (42e6, "42 MB"),
        (3.1e9, "3.1 GB"),
    ],
)
def test_bytes_are_in_powers_of_a_thousand(nbytes: float, expected: str) -> None:
    """As disks and networks count them; never more than six characters."""
    assert format_bytes(nbytes) == expected
