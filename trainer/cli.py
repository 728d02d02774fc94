"""The command ``stagecast``.

Exit codes: 0 when the run finished; 1 for an error, told in one sentence; 2 for wrong arguments; 130 and 143 when
SIGINT (Ctrl-C) or SIGTERM ended it. The first signal stops the run at its next step, and what it has reached is still
shown; a second one ends it at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

_SIGNAL_CODES = {"SIGINT": 130, "SIGTERM": 143}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: The command line; None for that of the process.

    Raises:
        SystemExit: with code 2, for wrong arguments; with code 143 on a second SIGTERM.
    """
    options = _parser().parse_args(arguments)
    try:
        return _demo(options)
    except KeyboardInterrupt:
        print("stagecast: ended at once", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagecast", description="Train PyTorch modules over an event bus.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"stagecast {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a small language model on the source of Python's standard library",
        description="Train a small character-level transformer on the source of Python's own standard library: about a"
        " minute on two CPU cores. Ctrl-C stops it at the next step and shows what it has reached.",
        allow_abbrev=False,
    )
    demo.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps (default: about a minute's worth)")
    demo.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="of weights and order (default: 0)")
    demo.add_argument("--run-dir", metavar="FOLDER", help="the run's folder (default: runs/RUN_ID)")
    return parser


def _demo(options: argparse.Namespace) -> int:
    # NumPy is no dependency of ours; torch says at each import that it could not find it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    # Imported here, so that --help and errors of the command line do not wait for torch.
    import torch

    from events.errors import StagecastError
    from sinks.format import format_ledger
    from trainer import Trainer
    from trainer.data import resolve_device
    from trainer.errors import ArgumentsError
    from trainer.examples.charlm import CharLM, arguments_for, size_for
    from trainer.examples.text import load_text

    try:
        device = resolve_device(options.device)
        text = load_text()
        size = size_for(device)
        torch.manual_seed(options.seed)
        module = CharLM(text, size)
        weights = sum(parameter.numel() for parameter in module.parameters())
        print(
            f"A transformer of {weights / 1e6:.1f} million weights learns to write Python, on {device}:\n"
            f"{len(text.train):,} characters from {text.files} files in {text.root},\n"
            f"validated on {len(text.val):,} characters from files that it does not learn from.\n",
            flush=True,
        )
        arguments = arguments_for(size, device, steps=options.steps, seed=options.seed)
        result = Trainer(module, arguments, run_dir=options.run_dir).train()
        print(f"\nAfter {result.global_step} steps it writes:\n", flush=True)
        print(textwrap.indent(module.write("def ", 400).rstrip(), "    | ", lambda _: True))
        ledger = format_ledger(result.ledger)
        print(f"\nWhere the loop's time went:\n\n{ledger}\n\nRun folder: {result.run_dir}", flush=True)
    except BrokenPipeError:  # whoever read it (`head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would say so at its end
        return 1
    except (StagecastError, OSError) as error:
        print(f"stagecast demo: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentsError) else 1
    return _SIGNAL_CODES.get(result.reason or "", 0)


def _positive(text: str) -> int:
    number = _natural(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _version() -> str:
    try:
        return version("stagecast")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
