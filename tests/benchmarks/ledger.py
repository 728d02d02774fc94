"""The stall ledger against the bare loop: does it name what the loop loses?

    python tests/benchmarks/ledger.py [--pairs 40] [--steps 2000]

First the tiny MLP with its journal: ``other_s``, and the sum of the rows that are not compute beside the measured
difference to the bare loop, which clears the gradients as the trainer does, so that the model costs both the same. Then
a callback that sleeps 10 ms a step and sees every hook: what the loop waited for it is known from outside (total minus
bare), and the ledger's ``backpressure_s`` is compared with it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from overhead import Sleeps, TinyMLP, bare
from report import bounds, header

from events.messages import StallLedger
from trainer import Delivery, Trainer, TrainerArguments


def ledger_of(steps: int, **options: Any) -> StallLedger:
    """The ledger of one run of the tiny MLP."""
    arguments = TrainerArguments(train_batch_size=32, device="cpu", drain_timeout_s=5.0)
    with tempfile.TemporaryDirectory() as folder:
        if options.get("journal", True):
            options["run_dir"] = f"{folder}/run"
        return Trainer(TinyMLP(steps), arguments, sinks=[], **options).train().ledger


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=2_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bare(options.steps, by_hand=True)
    ledger_of(options.steps)
    other, named, difference = [], [], []
    before = bare(options.steps, by_hand=True)
    for _ in range(options.pairs):
        ledger = ledger_of(options.steps)
        after = bare(options.steps, by_hand=True)
        other.append(ledger.other_s / ledger.wall_s)
        named.append((ledger.wall_s - ledger.compute_s) / ledger.wall_s)
        difference.append((ledger.wall_s - (before + after) / 2) / ledger.wall_s)
        before = after
    print(header())
    print(f"\njournal, {options.pairs} runs of {options.steps} steps, per cent of the run's wall time")
    print(f"{'':36}{'median':>8}{'95 % from':>12}{'to':>8}")
    rows = (("other_s (bar: 1)", other), ("rows that are not compute", named), ("measured against bare", difference))
    for name, values in rows:
        low, high = bounds(values)
        print(f"{name:36}{100 * statistics.median(values):8.2f}{100 * low:12.2f}{100 * high:8.2f}")
    # A small queue, so that the loop waits from early on: what it waits in all is nearly (steps - queue) * 10 ms.
    steps, queue = 400, 16
    delivery = Delivery(overflow="block", capacity=queue, batch=8, on_error="fatal")
    waits, named, rest = [], [], []
    before = bare(steps, by_hand=True)
    for _ in range(9):
        ledger = ledger_of(steps, journal=False, callbacks=[(Sleeps(), delivery)])
        after = bare(steps, by_hand=True)
        waits.append(ledger.wall_s - (before + after) / 2)
        named.append(ledger.backpressure_s / waits[-1])
        rest.append((ledger.wall_s - ledger.compute_s - ledger.backpressure_s) / waits[-1])
        before = after
    print(f"\ncallback that sleeps 10 ms a step, every hook once, queue of {queue}: {len(waits)} runs of {steps} steps")
    print(f"the run took longer than a bare loop by {statistics.median(waits):.3f} s; per cent of that")
    print(f"{'':36}{'median':>8}{'95 % from':>12}{'to':>8}")
    for name, values in (("backpressure_s (bar: 98 to 102)", named), ("other rows that are not compute", rest)):
        low, high = bounds(values)
        print(f"{name:36}{100 * statistics.median(values):8.2f}{100 * low:12.2f}{100 * high:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
