"""Format numbers and durations for people. Imports only events and the standard library."""

from __future__ import annotations

import math
import time
import unicodedata

from events.messages import StallLedger
from events.text import plain_text as plain_text

# These rows add up to the wall time.
_LEDGER_ROWS = (
    ("compute", "compute_s"),
    ("contention", "contention_s"),
    ("data", "data_s"),
    ("readback", "readback_s"),
    ("publish", "publish_s"),
    ("inline hooks", "inline_s"),
    ("fences", "fence_s"),
    ("backpressure", "backpressure_s"),
    ("checkpoint", "checkpoint_s"),
    ("paused", "paused_s"),
    ("other", "other_s"),
)


def format_duration(seconds: float) -> str:
    """A duration in about seven characters: ``32 us``, ``4.2 s``, ``42 s``, ``3m 07s``, ``2h 05m``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "?"
    if 0 < seconds < 0.0009995:
        return f"{seconds * 1_000_000:.0f} us"
    if seconds < 0.9995:
        return f"{seconds * 1_000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3_600}h {whole % 3_600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3_600:02d}h"


def format_number(value: float) -> str:
    """A metric in six characters if possible, so that columns of losses do not move."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if size >= 99_999.5 or 0 < size < 0.001:
        return f"{value:.3e}"
    decimals = 4 if size < 9.99995 else 3 if size < 99.9995 else 2 if size < 999.995 else 1
    return f"{value:.{decimals}f}"


def format_bytes(nbytes: float) -> str:
    """Bytes in powers of a thousand, with up to six characters: ``812 B``, ``1.5 GB``, ``42 MB``."""
    unit = "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if nbytes < 999.5:
            break
        nbytes, unit = nbytes / 1_000, larger
    return f"{nbytes:.1f} {unit}" if unit != "B" and nbytes < 9.95 else f"{nbytes:.0f} {unit}"


def format_rate(steps_per_s: float, *, short: bool = False) -> str:
    """Steps per second, or seconds per step if a step takes longer than a second."""
    if not math.isfinite(steps_per_s) or steps_per_s <= 0:
        return "?"
    if steps_per_s < 1:
        return f"{format_duration(1 / steps_per_s)}/step"
    number = f"{steps_per_s:.0f}" if steps_per_s >= 99.95 else f"{steps_per_s:.1f}"
    return f"{number}/s" if short else f"{number} steps/s"


def format_clock(unix_s: float) -> str:
    """The local time of day of an event."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(unix_s))
    except (OverflowError, OSError, ValueError):  # NaN, or a year beyond the C library's range
        return "--:--:--"


def cells(text: str) -> int:
    """The width of printable text, in terminal columns."""
    if text.isascii():
        return len(text)
    return sum(_char_cells(c) for c in text)


def _char_cells(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def format_ledger(ledger: StallLedger) -> str:
    """The stall ledger as a plain table: row, seconds, percent of the wall time."""
    rows = [(label, getattr(ledger, field)) for label, field in _LEDGER_ROWS]
    rows.append(("wall", ledger.wall_s))
    if ledger.device_idle_s is not None:
        # In parentheses, because it overlaps the rows above and is not part of their sum.
        rows.append(("(device idle", ledger.device_idle_s))
    width = max(9, *(len(f"{seconds:.3f}") for _, seconds in rows))
    lines = [f"{'loop time':<14}{'seconds':>{width}}  percent"]
    for label, seconds in rows:
        close = ")" if label.startswith("(") else ""
        lines.append(f"{label:<14}{seconds:>{width}.3f}  {_percent(seconds, ledger.wall_s):>7}{close}")
    if ledger.steps:
        step = format_duration(ledger.wall_s / ledger.steps)
        lines.append(f"{'per step':<14}{step:>{width}}  {ledger.steps:,} steps")
    return "\n".join(lines)


def ledger_shares(ledger: StallLedger) -> list[tuple[str, str]]:
    """The rows of the ledger with at least 0.05 %, as ``(row, percent)``: a summary for one line."""
    shares = [
        (label, _percent(seconds, ledger.wall_s))
        for label, field in _LEDGER_ROWS
        if (seconds := getattr(ledger, field)) >= 0.0005 * ledger.wall_s > 0
    ]
    if ledger.device_idle_s is not None and ledger.wall_s > 0:
        shares.append(("device idle", _percent(ledger.device_idle_s, ledger.wall_s)))
    return shares


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole > 0 else "-"
