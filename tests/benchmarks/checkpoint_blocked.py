"""What a save costs when nothing else runs: how long it holds the loop, and when it is durable.

    python tests/benchmarks/checkpoint_blocked.py [--gigabytes 0.51] [--rounds 7] [--saves 4] [--loader both]
    python tests/benchmarks/checkpoint_blocked.py --only peers

Each round visits every peer, in an order that changes: it is built ("opened"), saves once ("first") and then
``--saves`` times ("blocked", "durable"), each time until the save is durable, and is closed. The single-thread copy of
the same bytes into prepared memory is measured before and after each save, and a save's ratio is its blocked time over
the mean of these two. Between two saves every tensor is changed and the files are removed.

With ``--loader fork`` a DataLoader with two forked workers is built before each save and lives on through it, as in an
epoch: after a fork, memory that the children got is copied page by page when it is written to.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter as clock

import torch
from checkpoint_peers import (
    PEERS,
    Memcpy,
    Ours,
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
from torch.utils.data import DataLoader, TensorDataset

Workers = Callable[[], AbstractContextManager[None]]


@dataclass
class Visit:
    """One peer in one round: its first save, and the later ones."""

    opened_s: float
    prefault_s: float
    blocked: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def first_ratio(self) -> float:
        return self.blocked[0] / statistics.median(self.blocked[1:])


@contextmanager
def no_workers() -> Iterator[None]:
    yield


@contextmanager
def two_workers() -> Iterator[None]:
    """A DataLoader's epoch: two forked workers, from its first batch to its last."""
    data = TensorDataset(torch.arange(64.0))
    loader = DataLoader(data, batch_size=4, num_workers=2, persistent_workers=False, multiprocessing_context="fork")
    batches = iter(loader)
    next(batches)
    yield
    for _ in batches:
        pass


def visit(name: str, state: State, folder: Path, floor: Memcpy, saves: int, workers: Workers) -> Visit:
    """One peer, from building it to closing it."""
    with opened(name, state, folder) as (peer, opened_s):
        seen = Visit(opened_s, peer.prefault_s if isinstance(peer, Ours) else 0.0)
        for step in range(saves + 1):
            with workers():
                state.update()
                before = copied(floor)
                begin = clock()
                peer.save(step)
                blocked_s = clock() - begin
                peer.wait()
                durable_s = clock() - begin
                after = copied(floor)
            check_written(name, peer)
            peer.clean()
            settle(folder)
            seen.blocked.append(blocked_s)
            seen.durable.append(durable_s)
            seen.ratios.append(2 * blocked_s / (before + after))
    return seen


def copied(floor: Memcpy) -> float:
    """Seconds of one copy."""
    begin = clock()
    floor.save(0)
    return clock() - begin


def warm(visits: list[Visit], column: str) -> list[float]:
    """What all saves but the first of each visit took."""
    return [value for seen in visits for value in getattr(seen, column)[1:]]


def by_round(visits: list[Visit], column: str) -> list[float]:
    """The median of the same for each visit."""
    return [statistics.median(getattr(seen, column)[1:]) for seen in visits]


def show_peers(visits: dict[str, list[Visit]]) -> None:
    """Everyone side by side, in milliseconds."""
    print(
        f"{'ms':30}{'opened':>8}{'first':>8}{'blocked':>9}{'p99':>8}"
        f"{'/memcpy':>9}{'95 % to':>9}{'durable':>9}{'p99':>8}{'first/warm':>12}"
    )
    for name, seen in visits.items():
        blocked, durable, ratios = warm(seen, "blocked"), warm(seen, "durable"), warm(seen, "ratios")
        row = (
            f"{PEERS[name][0]:30}{1e3 * statistics.median(one.opened_s for one in seen):8.0f}"
            f"{1e3 * statistics.median(one.blocked[0] for one in seen):8.1f}"
            f"{1e3 * statistics.median(blocked):9.1f}{1e3 * percentile(blocked, 99):8.1f}"
            f"{statistics.median(ratios):9.2f}{bounds(ratios)[1]:9.2f}"
        )
        if name in ("memcpy", "plain_copy"):
            row += f"{'-':>9}{'-':>8}"
        else:
            row += f"{1e3 * statistics.median(durable):9.0f}{1e3 * percentile(durable, 99):8.0f}"
        print(row + f"{statistics.median(one.first_ratio for one in seen):12.2f}")


def show_bars(visits: dict[str, list[Visit]]) -> None:
    """What ours is held to."""
    ours = visits.get("ours")
    if ours is None:
        return
    print(f"\n{'ours':44}{'median':>8}{'95 % from':>11}{'to':>8}{'bar':>10}")
    row("blocked, over memcpy", warm(ours, "ratios"), "<= 1.20")
    row("first save, over a warm one", [seen.first_ratio for seen in ours], "<= 1.30")
    if "torch_save" in visits:
        theirs, mine = by_round(visits["torch_save"], "durable"), by_round(ours, "durable")
        row("torch.save's durable time, over ours", ratio(theirs, mine), ">= 1.50")
    if "ours_unhashed" in visits:
        mine, without = by_round(ours, "durable"), by_round(visits["ours_unhashed"], "durable")
        row("hash, per cent of the durable time", [100 * (1 - share) for share in ratio(without, mine)], "<= 10")
    prefault_ms = 1e3 * statistics.median(seen.prefault_s for seen in ours)
    print(f"{'prefault, once, ms':44}{prefault_ms:8.0f}")


def ratio(above: list[float], below: list[float]) -> list[float]:
    """Round by round."""
    return [one / other for one, other in zip(above, below, strict=True)]


def row(name: str, values: list[float], bar: str) -> None:
    low, high = bounds(values)
    print(f"{name:44}{statistics.median(values):8.2f}{low:11.2f}{high:8.2f}{bar:>10}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    add_only(parser)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--saves", type=int, default=4, help="in each visit, after its first (default: %(default)s)")
    parser.add_argument("--loader", choices=("none", "fork", "both"), default="both", help="DataLoader workers")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(header())
    state = adam_state(options.gigabytes)
    loaders: dict[str, tuple[str, Workers]] = {
        "none": ("no DataLoader workers", no_workers),
        "fork": ("two DataLoader workers, forked before each save", two_workers),
    }
    with disk(options.dir) as folder:
        floor = Memcpy(state, folder)
        print(f"{state.describe()}; disk: {filesystem(folder)} at {options.dir.resolve()}")
        print(f"{options.rounds} rounds of a first save and {options.saves} more")
        for key, (title, workers) in loaders.items():
            if options.loader not in (key, "both"):
                continue
            visits: dict[str, list[Visit]] = {name: [] for name in chosen(options.only)}
            for _ in range(options.rounds):
                for name in random.sample(list(visits), len(visits)):
                    visits[name].append(visit(name, state, folder, floor, options.saves, workers))
            print(f"\n{title}")
            show_peers(visits)
            show_bars(visits)
    return 0


if __name__ == "__main__":
    sys.exit(main())
