"""What a save costs the steps beside it: a Python-heavy loop of 1.3 ms steps, and a ticker of 1 kHz.

    python tests/benchmarks/checkpoint_stall.py [--gigabytes 0.51] [--rounds 7] [--saves 5]
    python tests/benchmarks/checkpoint_stall.py --only peers

Each round visits every peer, in an order that changes. In a visit, windows of steps with one save in them alternate
with windows of steps without. What a save loses is the time of its window less that of as many steps without, by the
median of those windows; blocked is the part of it that ``save()`` itself takes, which no copy can undercut. A window is
half as long again as the peer's own save takes beside the loop, and longer where a save outlasts it.

The p99 of a step is taken over the steps between the end of ``save()`` and the save being durable, and over those of
the windows without; who saves in the loop has none of the first.

Then the gaps of a thread that does nothing but ``sleep(0.001)``: while the peer saves again and again, and as long
without, in turn, with the loop idle and with it running. What holds the GIL shows up there.
"""

from __future__ import annotations

import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter as clock

import torch
from checkpoint_peers import (
    PEERS,
    Peer,
    PythonStep,
    State,
    adam_state,
    add_only,
    arguments,
    check_written,
    chosen,
    disk,
    filesystem,
    opened,
    settle,
)
from report import bounds, header, percentile

_LEAST_STEPS = 250


@dataclass
class Gaps:
    """Gaps of the ticker in seconds, during saves and without."""

    saving: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return percentile(self.saving, 99.9) / percentile(self.quiet, 99.9)


@dataclass
class Visit:
    """One peer in one round; all in seconds."""

    steps: int
    blocked: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    idle: Gaps = field(default_factory=Gaps)
    beside: Gaps = field(default_factory=Gaps)


class Ticker:
    """A thread that wakes each millisecond and notes how long that took."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self._over = False
        self._thread = threading.Thread(target=self._run, name="ticker")

    def _run(self) -> None:
        before = clock()
        while not self._over:
            time.sleep(0.001)
            now = clock()
            self.gaps.append(now - before)
            before = now

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()


def visit(name: str, state: State, folder: Path, step: PythonStep, saves: int, ticker_s: float) -> Visit:
    """One peer, from building it to closing it."""
    with opened(name, state, folder) as (peer, _):
        numbers = iter(range(1_000_000))
        for _ in range(2):  # the first save is another benchmark's
            steps = steps_of_a_save(peer, next(numbers), step)
            check_written(name, peer)
            cleaned(peer)
        seen = Visit(max(_LEAST_STEPS, steps * 3 // 2))
        with_save, without = [], [window(seen.steps, step, seen.outside)]
        for _ in range(saves):
            with_save.append(window_with_save(peer, next(numbers), seen, step))
            cleaned(peer)
            without.append(window(seen.steps, step, seen.outside))
        step_s = statistics.median(without) / seen.steps
        seen.lost = [taken - steps * step_s for taken, steps in with_save]
        for gaps, beside in ((seen.idle, None), (seen.beside, step)):
            for _ in range(2):
                gaps.quiet += ticks_without(ticker_s / 2, beside)
                gaps.saving += ticks_of_saves(peer, numbers, ticker_s / 2, beside)
    return seen


def cleaned(peer: Peer) -> None:
    """Removes what was saved, and has the disk done with it."""
    peer.wait()
    peer.clean()
    settle(peer.folder)


def steps_of_a_save(peer: Peer, number: int, step: PythonStep) -> int:
    """How many steps pass until a save is durable."""
    peer.save(number)
    steps = 0
    while peer.busy():
        step()
        steps += 1
    peer.wait()
    return steps


def window(steps: int, step: PythonStep, times: list[float]) -> float:
    """So many steps; returns their seconds, and adds those of each to ``times``."""
    begin = before = clock()
    for _ in range(steps):
        step()
        now = clock()
        times.append(now - before)
        before = now
    return before - begin


def window_with_save(peer: Peer, number: int, seen: Visit, step: PythonStep) -> tuple[float, int]:
    """As many steps, with a save after the first few, or more, until it is durable; returns the seconds and steps."""
    begin = clock()
    for _ in range(5):
        step()
    steps = 5
    asked = clock()
    peer.save(number)
    before = clock()
    seen.blocked.append(before - asked)
    while peer.busy():
        step()
        steps += 1
        now = clock()
        seen.during.append(now - before)
        before = now
    for _ in range(seen.steps - steps):
        step()
    return clock() - begin, max(steps, seen.steps)


def ticks_without(seconds: float, step: PythonStep | None) -> list[float]:
    """The ticker's gaps while nothing is saved."""
    with Ticker() as ticker:
        deadline = clock() + seconds
        if step is None:
            time.sleep(seconds)
        while clock() < deadline:
            if step is not None:
                step()
    return ticker.gaps


def ticks_of_saves(peer: Peer, numbers: Iterator[int], seconds: float, step: PythonStep | None) -> list[float]:
    """The ticker's gaps during saves: one after the other, until they have taken so many seconds."""
    gaps: list[float] = []
    taken = 0.0
    while taken < seconds:
        with Ticker() as ticker:
            begin = clock()
            peer.save(next(numbers))
            while step is not None and peer.busy():
                step()
            peer.wait()
            taken += clock() - begin
        gaps += ticker.gaps
        cleaned(peer)
    return gaps


def show_peers(visits: dict[str, list[Visit]]) -> None:
    """Everyone side by side."""
    print(
        f"{'':30}{'steps':>7}{'blocked ms':>12}{'lost ms':>9}{'95 % to':>9}{'p99':>8}"
        f"{'step p99 ms':>13}{'without':>9}{'gap p99.9 ms':>14}{'without':>9}{'in loop':>9}{'without':>9}"
    )
    for name, seen in visits.items():
        blocked = [value for one in seen for value in one.blocked]
        lost = [value for one in seen for value in one.lost]
        during = [value for one in seen for value in one.during]
        outside = [value for one in seen for value in one.outside]
        shown = f"{1e3 * percentile(during, 99):13.2f}" if during else f"{'-':>13}"
        line = (
            f"{PEERS[name][0]:30}{statistics.median(one.steps for one in seen):7.0f}"
            f"{1e3 * statistics.median(blocked):12.1f}{1e3 * statistics.median(lost):9.1f}"
            f"{1e3 * bounds(lost)[1]:9.1f}{1e3 * percentile(lost, 99):8.1f}"
            f"{shown}{1e3 * percentile(outside, 99):9.2f}"
        )
        for which, width in (("idle", 14), ("beside", 9)):
            saving = [gap for one in seen for gap in getattr(one, which).saving]
            quiet = [gap for one in seen for gap in getattr(one, which).quiet]
            line += f"{1e3 * percentile(saving, 99.9):{width}.2f}{1e3 * percentile(quiet, 99.9):9.2f}"
        print(line)


def show_bars(visits: dict[str, list[Visit]]) -> None:
    """What ours is held to; each ratio is one of medians, or of percentiles, in the same round."""
    ours = visits.get("ours")
    if ours is None:
        return
    print(f"\n{'ours':44}{'median':>8}{'95 % from':>11}{'to':>8}{'bar':>10}")
    mine = [statistics.median(one.lost) for one in ours]
    for peer, bar in (("dcp_thread", "<= 0.10"), ("dcp_process", "<= 0.25")):
        if peer in visits:
            theirs = [statistics.median(one.lost) for one in visits[peer]]
            title = f"lost, over {PEERS[peer][0].split(',')[0]}'s"
            row(title, [one / other for one, other in zip(mine, theirs, strict=True)], bar)
    p99 = [percentile(one.during, 99) / percentile(one.outside, 99) for one in ours if one.during]
    row("p99 of a step during a save, over outside", p99, "<= 1.15")
    row("p99.9 of the gaps, loop idle, over without", [one.idle.ratio for one in ours], "<= 1.50")
    row("p99.9 of the gaps, loop running, over without", [one.beside.ratio for one in ours], "<= 1.50")


def row(name: str, values: list[float], bar: str) -> None:
    low, high = bounds(values)
    print(f"{name:44}{statistics.median(values):8.2f}{low:11.2f}{high:8.2f}{bar:>10}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    add_only(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--saves", type=int, default=5, help="in each visit (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=1.3)
    parser.add_argument("--ticker-s", type=float, default=4.0, help="of each kind in each visit (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(header())
    state = adam_state(options.gigabytes)
    step = PythonStep(options.step_ms / 1e3)
    visits: dict[str, list[Visit]] = {name: [] for name in chosen(options.only, without=("plain_copy",))}
    with disk(options.dir) as folder:
        print(f"{state.describe()}; disk: {filesystem(folder)} at {options.dir.resolve()}")
        print(f"step: {step.step_s * 1e3:.2f} ms; {options.rounds} rounds of {options.saves} saves\n")
        for _ in range(options.rounds):
            for name in random.sample(list(visits), len(visits)):
                visits[name].append(visit(name, state, folder, step, options.saves, options.ticker_s))
    show_peers(visits)
    show_bars(visits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
