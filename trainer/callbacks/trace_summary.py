"""Compress a trace of torch's profiler and add up its operators: a script of its own, in a process of its own.

In the process of the run it would hold the interpreter lock for seconds, and the training loop with it. It imports the
standard library alone. Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterable
from typing import Any

_ON_HOST = "cpu_op"
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def summarise(events: Iterable[dict[str, Any]], most: int) -> list[tuple[str, int, float, bool]]:
    """Return the operators with the longest time of their own, and the device's longest kernels.

    Args:
        events: Of the trace; complete ones (``"ph": "X"``) have ``ts`` and ``dur`` in microseconds.
        most: Maximum rows of either kind.

    Returns:
        Name, calls, seconds without nested operators, and whether it is a kernel.
    """
    host: dict[str, list[float]] = {}
    device: dict[str, list[float]] = {}
    threads: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("ph") != "X":
            continue
        name, category = str(event.get("name")), event.get("cat")
        start, length = float(event["ts"]), float(event["dur"])
        if category == _ON_HOST:
            threads.setdefault((event.get("pid"), event.get("tid")), []).append((start, -length, name))
        elif category in _ON_DEVICE:
            _add(device, name, length)
            device[name][0] += 1
    for calls in threads.values():
        enclosing: list[tuple[float, str]] = []  # ends and names of the operators around the current one
        for start, negative, name in sorted(calls):
            while enclosing and enclosing[-1][0] <= start:
                enclosing.pop()
            if enclosing:
                _add(host, enclosing[-1][1], negative)
            _add(host, name, -negative)
            # An operator that calls itself, with other types, is one call, as in torch's tables.
            host[name][0] += not (enclosing and enclosing[-1][1] == name)
            enclosing.append((start - negative, name))
    rows = []
    for times, on_device in ((host, False), (device, True)):
        longest = sorted(times.items(), key=lambda one: -one[1][1])[:most]
        rows += [(name, int(calls), total / 1e6, on_device) for name, (calls, total) in longest]
    return rows


def _add(times: dict[str, list[float]], name: str, length: float) -> None:
    times.setdefault(name, [0, 0.0])[1] += length


def main(source: str, target: str, most: int) -> None:
    """Write the compressed trace, and print the summary as JSON."""
    os.nice(5)  # the loop comes first
    with open(source, "rb") as file:
        data = file.read()
    with open(target, "wb") as file:
        file.write(gzip.compress(data, 5))
    json.dump(summarise(json.loads(data)["traceEvents"], most), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
