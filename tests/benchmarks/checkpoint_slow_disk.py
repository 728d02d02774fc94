"""A disk where each write takes a second, and a save every 50 steps: does anything pile up?

    python tests/benchmarks/checkpoint_slow_disk.py [--gigabytes 0.51] [--steps 20000] [--write-s 1]

Only ours, told to skip a save when both slabs are in use. Each write that it makes through ``os`` is delayed in the
process (see `slow_writes`); the loop runs its steps of 1.3 ms all the while. Resident memory is read every ten steps;
the bound is what it was with the state alone, and two snapshots. Then the disk is quick again and the last save must
become durable. A run that saw no write of ours measured nothing, and fails.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
from collections.abc import Sequence
from time import perf_counter as clock

import psutil
import torch
from checkpoint_peers import Ours, PythonStep, adam_state, arguments, check_written, disk, filesystem, slow_writes
from report import header, percentile

_MIB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=50, help="steps from save to save (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=1.3)
    parser.add_argument("--write-s", type=float, default=1.0, help="seconds of each write (default: %(default)s)")
    parser.add_argument("--small-mib", type=float, default=64.0, help="what may come on top (default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(header())
    process = psutil.Process()
    state = adam_state(options.gigabytes)
    step = PythonStep(options.step_ms / 1e3)
    asked = most_queued = 0
    held: list[float] = []
    with disk(options.dir) as folder:
        print(f"{state.describe()}; disk: {filesystem(folder)} at {options.dir.resolve()}")
        print(f"{options.steps:,} steps of {step.step_s * 1e3:.2f} ms, a save every {options.every}")
        gc.collect()
        base = process.memory_info().rss
        with contextlib.closing(Ours(state, folder, skip=True)) as ours:
            opened = peak = process.memory_info().rss
            first_third = 0
            with slow_writes(options.write_s) as seen:
                for number in range(1, options.steps + 1):
                    step()
                    if number % options.every == 0:
                        begin = clock()
                        ours.save(number)
                        held.append(clock() - begin)
                        asked += 1
                        most_queued = max(most_queued, ours.queued())
                    if number % 10 == 0:
                        peak = max(peak, process.memory_info().rss)
                    if number == options.steps // 3:
                        first_third = peak
                writes, nbytes, most_writes = seen.writes, seen.nbytes, seen.most_in_flight
                saved, skipped, waiting = ours.saved, ours.skipped, ours.queued()
            ours.wait()
            check_written("ours", ours)
            saved_in_the_end = ours.saved
        del ours
        gc.collect()
        closed = process.memory_info().rss
    bound = base + 2 * state.nbytes + options.small_mib * _MIB
    print(f"\n{'resident memory, MiB':44}{'':>8}{'bar':>10}")
    print(f"{'with the state alone':44}{base / _MIB:8.0f}")
    print(f"{'when ours is built':44}{opened / _MIB:8.0f}")
    print(f"{'peak in the first third':44}{first_third / _MIB:8.0f}")
    print(f"{'peak':44}{peak / _MIB:8.0f}{f'<= {bound / _MIB:.0f}':>10}")
    print(f"{'when ours is closed':44}{closed / _MIB:8.0f}")
    print(f"\n{'saves':44}")
    print(f"{'asked for':44}{asked:8,}")
    print(f"{'saved while the disk was slow':44}{saved:8,}")
    print(f"{'skipped':44}{skipped:8,}")
    print(f"{'still held when it was quick again':44}{waiting:8,}{'<= 2':>10}")
    print(f"{'saved and skipped in the end':44}{saved_in_the_end + skipped:8,}{f'= {asked:,}':>10}")
    print(f"{'held in memory at once, most':44}{most_queued:8,}{'<= 2':>10}")
    print(f"{'save() held the loop, ms, median':44}{1e3 * statistics.median(held):8.1f}")
    print(f"{'save() held the loop, ms, p99':44}{1e3 * percentile(held, 99):8.1f}")
    print(f"\n{writes:,} writes of {nbytes / 1e9:.2f} GB in all took {options.write_s:g} s each, {most_writes} at once")
    if not writes:
        print("the hook saw no write: whoever writes does not call os.write, pwrite, writev or pwritev")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
