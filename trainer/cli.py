"""The command ``stagecast``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 when it did what it was asked, 130 when a signal stopped it early.

    Errors of the command line end the process with status 2, as argparse does.
    """
    parser = argparse.ArgumentParser(prog="stagecast", description="Train PyTorch modules over an event bus.")
    parser.add_argument("--version", action="version", version=f"stagecast {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small language model on the source of Python's standard library",
        description="Trains a small character-level transformer on the source of Python's own standard library, for"
        " about a minute, and shows a text that it wrote, the run's folder and where the loop's time went.",
    )
    demo.add_argument("--steps", type=_count, metavar="N", help="optimizer steps (default: about a minute's worth)")
    demo.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    demo.add_argument("--seed", type=int, default=0, help="of the weights, the order of the data and the sample")
    demo.add_argument("--run-dir", metavar="FOLDER", help="the run's folder (default: runs/RUN_ID)")
    options = parser.parse_args(arguments)
    return _demo(options)


def _demo(options: argparse.Namespace) -> int:
    # Imported here, so that --help and errors of the command line do not wait for torch.
    import torch

    from events.errors import StagecastError
    from sinks.format import format_ledger
    from trainer import Trainer
    from trainer.data import resolve_device
    from trainer.examples.charlm import LARGE, SMALL, CharLM, arguments_for
    from trainer.examples.text import load_text

    try:
        device = resolve_device(options.device)
        text = load_text()
        size = LARGE if device.type == "cuda" else SMALL
        torch.manual_seed(options.seed)
        module = CharLM(text, size)
        settings = arguments_for(size, steps=options.steps, device=str(device), seed=options.seed)
        characters = len(text.train) + len(text.val)
        print(f"{characters:,} characters of Python from {text.files} files below {text.root}", file=sys.stderr)
        result = Trainer(module, settings, run_dir=options.run_dir).train()
    except (StagecastError, FileNotFoundError) as error:
        print(f"stagecast demo: {error}", file=sys.stderr)
        return 1
    if module.sample:
        print(f"\nAfter {result.global_step} steps it writes:\n\n{module.sample}\n")
    print(f"Where the loop's time went:\n{format_ledger(result.ledger)}\n")
    print(f"Run folder: {result.run_dir}")
    return 0 if result.status == "finished" else 130


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of steps: it must be at least 1")
    return number


def _version() -> str:
    try:
        return version("stagecast")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
