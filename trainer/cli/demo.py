"""``stagecast demo``: a run of the character-level language model, and a text that it writes."""

from __future__ import annotations

import torch

from trainer import Trainer
from trainer.cli.text import echo
from trainer.errors import RunInterrupted, RunTerminated
from trainer.examples.charlm import CharLM, arguments_for, size_for
from trainer.examples.text import load_text
from trainer.run.device import resolve_device


def demo(steps: int | None, device: str, seed: int, run_dir: str | None) -> int:
    """Train the demo; returns the exit code.

    Raises:
        ArgumentsError: The device is not available, or the run folder is unsuitable.
        RunInterrupted: SIGINT stopped the run; the result is printed before. So is that of `RunTerminated`.
    """
    from sinks.format import format_ledger

    chosen = resolve_device(device)
    text = load_text()
    size = size_for(chosen)
    arguments = arguments_for(size, chosen, steps=steps, seed=seed)
    torch.manual_seed(seed)
    module = CharLM(text, size)
    weights = sum(parameter.numel() for parameter in module.parameters())
    print(
        f"A transformer of {weights / 1e6:.1f} million weights learns to write Python, on {chosen}:\n"
        f"{len(text.train):,} characters from {text.files} files in {text.root},\n"
        f"validated on {len(text.val):,} characters from other files.\n\n",
        end="",  # one write, even unbuffered, so that a reader of one line (`head -1`) does not break the pipe
        flush=True,
    )
    stop: RunInterrupted | RunTerminated | None = None
    try:
        result = Trainer(module, arguments, run_dir=run_dir).train()
    except (RunInterrupted, RunTerminated) as error:
        stop, result = error, error.result
    sample = module.write("def ", 400).expandtabs().rstrip().split("\n")
    plural = "s" if result.global_step != 1 else ""
    print(f"\nAfter {result.global_step} step{plural} it writes:\n", flush=True)
    echo(*(f"    | {line}" for line in sample))
    ledger = format_ledger(result.ledger).split("\n")
    echo("", "Where the loop's time went:", "", *ledger, "", f"Run folder: {result.run_dir}")
    if stop is not None:
        raise stop
    return 0
