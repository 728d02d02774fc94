"""A run publishes 20,000 events a second to a NATS server that is away for half a minute.

    python tests/benchmarks/nats_outage.py [--per-s 20000] [--seconds 20] [--away 30]

A thread of the run logs numbers, while its steps go on: first without the sink, then with it, while the server is away,
and after its return. For each phase: the time of a step, whose change is what the sink costs the loop. Then what the
stream has: every event of the journal, once and in order. At last how fast a page in another process may read them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))

import torch
from overhead import TinyMLP
from report import header, percentile
from support.nats_server import NatsServer

from events.journal.lines import decode_line
from events.journal.reader import JournalReader
from events.messages import Event, ObserversReported
from sinks import NATS
from sinks.nats.address import NatsAddress
from sinks.nats.mirror import NatsMirror
from trainer import Trainer, TrainerArguments

TICK_S = 0.005


class Logging(TinyMLP):
    """Logs a number so many times a second, on a thread, until its last phase is over.

    Args:
        phases: Names and seconds.
    """

    def __init__(self, per_s: int, phases: Sequence[tuple[str, float]], on_phase: Any) -> None:
        super().__init__(1_000_000)
        self.per_s, self.phases, self.on_phase = per_s, phases, on_phase
        self.phase = ""
        self.steps: dict[str, list[float]] = {name: [] for name, _ in phases}
        self.logged, self.behind_s = 0, 0.0
        self.thread: threading.Thread | None = None
        self.last = 0.0

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        now = time.perf_counter()
        if self.thread is None:
            self.thread = threading.Thread(target=self._log)
            self.thread.start()
        elif self.phase:
            self.steps[self.phase].append(now - self.last)
        self.last = now
        return super().train_step(global_step, batch, device)

    def _log(self) -> None:
        for name, seconds in self.phases:
            self.on_phase(name)
            self.phase = name
            begin = time.perf_counter()
            for tick in range(int(seconds / TICK_S)):
                time.sleep(max(0.0, begin + tick * TICK_S - time.perf_counter()))
                for _ in range(int(self.per_s * TICK_S)):
                    self.logged += 1
                    self.log("value", float(self.logged))
            self.behind_s = max(self.behind_s, time.perf_counter() - begin - seconds)
        self.phase = ""


def train(module: Logging, folder: str, name: str, *sinks: Any) -> tuple[Any, float]:
    """Train until the last phase is over; return the result, and the seconds of the end."""
    seconds = sum(seconds for _, seconds in module.phases)
    arguments = TrainerArguments(
        train_batch_size=32, device="cpu", max_time_s=seconds + 1.0, drain_timeout_s=120.0, ledger_interval_s=1.0
    )
    options: dict[str, Any] = {"sinks": sinks, "checkpoints": False, "run_dir": f"{folder}/{name}", "run_id": name}
    result = Trainer(module, arguments, **options).train()
    return result, time.perf_counter() - module.last


def events_of(run_dir: Path) -> list[Event]:
    reader = JournalReader(run_dir / "journal")
    return list(itertools.chain.from_iterable(iter(lambda: reader.read(10_000), [])))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-s", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--away", type=float, default=30.0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(header())
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder, "nats")).start()
        try:
            _measure(options, folder, server)
        finally:
            server.kill()
    return 0


def _measure(options: argparse.Namespace, folder: str, server: NatsServer) -> None:
    began: dict[str, float] = {}

    def on_phase(name: str) -> None:
        began[name] = time.time()
        if name == "the server is away":
            server.kill()
        elif name == "it is back":
            server.start()

    bare = Logging(options.per_s, [("without the sink", options.seconds)], on_phase)
    train(bare, folder, "bare")
    phases = [("with it", options.seconds), ("the server is away", options.away), ("it is back", options.seconds)]
    module = Logging(options.per_s, phases, on_phase)
    _, end_s = train(module, folder, "run", NATS(server.url))
    print(f"\n{'step, us':24}{'median':>10}{'p99':>10}{'steps':>10}")
    for name, times in (bare.steps | module.steps).items():
        median, p99 = statistics.median(times), percentile(times, 99)
        print(f"{name:24}{median * 1e6:10.0f}{p99 * 1e6:10.0f}{len(times):10,}")
    kept = events_of(Path(folder, "run"))
    stored = [decode_line(line)[0] for line in server.stored("run")]
    seconds = sum(length for _, length in phases)
    print(f"\n{module.logged:,} numbers logged in {seconds:.0f} s, at most {module.behind_s:.2f} s late")
    print(f"{len(kept):,} events in the journal ({len(kept) / seconds:,.0f}/s); {len(stored):,} in the stream")
    delivered = {event.seq for event in stored}
    last = stored[-1].seq
    missing = sum(event.seq not in delivered for event in kept if event.seq <= last)
    ordered = all(one.seq < other.seq for one, other in itertools.pairwise(stored))
    rest = sum(event.seq > last for event in kept)
    print(f"missing {missing}, repeated {len(stored) - len(delivered)}, in order: {ordered}; {rest} later, of the end")
    reports = [event for event in kept if isinstance(event, ObserversReported)]
    for name, length in phases:
        lags = [
            one.lag_s or 0.0
            for event in reports
            if began[name] <= event.time < began[name] + length
            for one in event.observers
            if one.observer == "nats"
        ]
        most, last_s = max(lags, default=0.0), lags[-1] if lags else 0.0
        print(f"{name:24} behind the run by {most:.1f} s at most, {last_s:.1f} s at its end")
    print(f"the end of the run took {end_s:.1f} s")
    _measure_reader(folder, server, last)


def _measure_reader(folder: str, server: NatsServer, last: int) -> None:
    mirror = NatsMirror(NatsAddress.of(server.url), Path(folder, "mirror"))
    begin = time.perf_counter()
    mirror.start()
    reader, seq = JournalReader(Path(folder, "mirror", "run", "journal")), 0
    while seq < last:
        events = reader.read(10_000)
        seq = events[-1].seq if events else seq
        time.sleep(0.0 if events else 0.05)
    seconds = time.perf_counter() - begin
    mirror.stop()
    print(f"`stagecast watch` copied them in {seconds:.1f} s ({last / seconds:,.0f}/s)")


if __name__ == "__main__":
    sys.exit(main())
