"""Outputs kept for the end of an epoch: the last step costs what the first did.

    python tests/benchmarks/outputs.py [--steps 2000]

Logits of shape ``(32, 1000)`` are captured and kept for 2,000 steps, 0.26 GB, as the loop does it; then collated once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from time import perf_counter_ns as clock

import torch
from report import header, percentile

from trainer.hooks.capture import Capture, EpochOutputs


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    capture = Capture(torch.device("cpu"), print)
    outputs = EpochOutputs(2**40, "benchmark", print)
    loss, logits = torch.zeros(()), torch.randn(32, 1000)
    costs: list[float] = []
    for _ in range(options.steps):
        begin = clock()
        outputs.append(capture.copy((loss, logits)))
        costs.append((clock() - begin) / 1e3)
    kept = outputs.nbytes
    begin = clock()
    collated = outputs.collated()
    collate_ms = (clock() - begin) / 1e6
    print(header())
    print(f"\ncapture and keep one step's outputs, microseconds; {kept / 1e9:.2f} GB kept")
    print(f"{'steps':>14}{'median':>9}{'p99':>9}")
    part = max(1, options.steps // 10)
    for name, values in (("first tenth", costs[:part]), ("last tenth", costs[-part:])):
        print(f"{name:>14}{statistics.median(values):9.1f}{percentile(values, 99):9.1f}")
    print(f"collated to {tuple(collated[1].shape)} in {collate_ms:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
