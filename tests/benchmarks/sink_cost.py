"""What sinks cost a launch-bound loop: here on threads, and in a sink host; and how much a host takes.

    python tests/benchmarks/sink_cost.py [--pairs 20] [--steps 8000] [--seconds 10]

As in ``overhead.py``: each round runs every variant once, in an order that changes, with the bare loop before and after
each; a variant's ratio is its time over the mean of these two. A sink that computes in Python all the time stands for
the worst client.

Then 50,000 events a second, published by a thread of the run, go through the journal and a host into JSON lines: what
was dropped anywhere, and how long the end took. At last a sink that hangs: how long closing the run took.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from overhead import TinyMLP, bare, trained
from report import bounds, header, percentile
from sink_workloads import Burns, Hangs

from sinks import CSV, JSONL, Live, TensorBoard
from trainer import Trainer, TrainerArguments


class Logs(TinyMLP):
    """Has a thread log a number so many times a second, while its only step waits."""

    def __init__(self, per_s: int, seconds: float) -> None:
        super().__init__(1)
        self.per_s, self.seconds = per_s, seconds
        self.behind_s = 0.0

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        thread = threading.Thread(target=self._log)
        thread.start()
        thread.join()
        return super().train_step(global_step, batch, device)

    def _log(self) -> None:
        begin, tick_s = time.perf_counter(), 0.002
        for tick in range(int(self.seconds / tick_s)):
            time.sleep(max(0.0, begin + tick * tick_s - time.perf_counter()))
            for index in range(int(self.per_s * tick_s)):
                self.log("value", float(index))
        self.behind_s = time.perf_counter() - begin - self.seconds


def variants(steps: int, folder: str) -> dict[str, tuple[float, Callable[[], float]]]:
    """Each variant with its bar."""

    def run(*sinks: Any, sinks_in: str = "thread", **options: Any) -> Callable[[], float]:
        return lambda: trained(steps, folder, sinks=list(sinks), sinks_in=sinks_in, **options)

    files = JSONL(), CSV(), TensorBoard()
    return {
        "bare against itself": (0.0, lambda: bare(steps)),
        "journal": (1.06, run()),
        "JSONL, CSV, TensorBoard": (1.15, run(*files)),
        "the same in the sink host": (1.06, run(*files, sinks_in="process")),
        "and one that burns, there": (1.06, run(*files, Burns(), sinks_in="process")),
        "Live, in the sink host": (1.06, run(Live(port=0))),
    }


def measure_overhead(pairs: int, steps: int, folder: str) -> None:
    ratios: dict[str, list[float]] = {}
    times: list[float] = []
    chosen = variants(steps, folder)
    before = bare(steps)
    for _ in range(pairs):
        for name in random.sample(list(chosen), len(chosen)):
            measured = chosen[name][1]()
            after = bare(steps)
            ratios.setdefault(name, []).append(2 * measured / (before + after))
            times.append(after)
            before = after
    print(f"bare step: {statistics.median(times) / steps * 1e6:.0f} us; {pairs} pairs of {steps} steps\n")
    print(f"{'':36}{'median':>8}{'95 % up to':>12}{'p99':>8}{'bar':>7}")
    for name, (bar, _) in chosen.items():
        values = ratios[name]
        shown = f"{bar:7.2f}" if bar else f"{'':7}"
        median = statistics.median(values)
        print(f"{name:36}{median:8.3f}{bounds(values)[1]:12.3f}{percentile(values, 99):8.3f}{shown}")


def measure_throughput(per_s: int, seconds: float, folder: str) -> None:
    module = Logs(per_s, seconds)
    arguments = TrainerArguments(train_batch_size=32, device="cpu", drain_timeout_s=60.0)
    out = Path(folder) / "many.jsonl"
    options: dict[str, Any] = {"sinks": [JSONL(path=str(out))], "sinks_in": "process", "checkpoints": False}
    result = Trainer(module, arguments, run_dir=f"{folder}/many", run_id="many", **options).train()
    with open(out, "rb") as file:
        lines = sum(1 for _ in file)
    logged = int(per_s * 0.002) * int(seconds / 0.002)
    print(
        f"\n{logged:,} events in {seconds:.0f} s ({per_s:,}/s; the publisher was {module.behind_s:.2f} s behind at the"
        f" end): {lines:,} lines written"
    )
    for report in result.observers:
        counts = f"published {report.published:,}, delivered {report.delivered:,}, dropped {report.dropped:,}"
        print(f"  {report.observer:12}{report.state:8}{counts}, left {report.left:,}")


def measure_hung(folder: str) -> None:
    for where in ("thread", "process"):
        arguments = TrainerArguments(train_batch_size=32, device="cpu", drain_timeout_s=2.0)
        options: dict[str, Any] = {"sinks": [Hangs()], "sinks_in": where, "checkpoints": False}
        begin = time.perf_counter()
        result = Trainer(TinyMLP(2_000), arguments, run_dir=f"{folder}/hung-{where}", **options).train()
        closing_s = time.perf_counter() - begin - result.ledger.wall_s
        print(f"closing a run with a sink that hangs ({where}): {closing_s:.2f} s, of a drain of 2 s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--per-s", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(header())
    with tempfile.TemporaryDirectory() as folder:
        if options.pairs:
            measure_overhead(options.pairs, options.steps, folder)
        if options.seconds:
            measure_throughput(options.per_s, options.seconds, folder)
        measure_hung(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
