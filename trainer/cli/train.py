"""``stagecast train``: a run from one file; its help is generated from the structs, without torch."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

import msgspec

from events.checkpoint.settings import Checkpoints
from events.errors import SinkMisconfigured
from events.field_docs import field_docs
from events.journal.writer import Journal
from events.protocol import RunResult
from trainer.arguments import TrainerArguments
from trainer.checkpoint.init_from import InitFrom
from trainer.cli.run_config import RunConfig, load_run_config, prepare
from trainer.cli.text import echo, show_exception
from trainer.config import describe_type
from trainer.distributed.ending import exit_now
from trainer.errors import ArgumentsError, PeerFailed, RunInterrupted, RunTerminated
from trainer.remote.rank import share_cores

if TYPE_CHECKING:
    from trainer.module_interface import ModuleInterface

_INTRODUCTION = """\
A file:

  module: {factory: "jobs.mnist:build", width: 256}
  arguments: {epochs: 3, train_batch_size: 64, seed: 0}
  sinks: [console, {sink: csv, path: metrics.csv}]
  callbacks: ["jobs.mnist:Sample"]
  checkpoints: {every_epochs: 1}
  run_id: mnist
  resume: auto

Override any setting by its dotted path; list items are indexed from 0, and
values are YAML:

  stagecast train run.yaml arguments.epochs=5 sinks.1.path=b.csv sinks.2=wandb

All settings of a file:
"""

# ------------------------------------------------------------------------------------------------- the run


def train(file: str, overrides: Sequence[str], *, check: bool, processes: int = 1) -> int:
    """Train the run of a file, or only check the file; returns the exit code.

    Args:
        processes: More than one replace this process by torchrun, with the same command on each rank.

    Raises:
        ArgumentsError: The file, or a name in it, is invalid.
        CheckpointNotFound: There is no checkpoint to resume from.
        BaseException: Exceptions of `Trainer.train` and of the user's factories propagate.
    """
    config = load_run_config(file, overrides)
    if processes > 1 and not check:
        _start_ranks(file, overrides, config, processes)
    trainer = prepare(config, file)
    if check:
        from trainer.run.relocation import check_resume

        check_resume(trainer)
        _print_summary(file, config, trainer.module)
        return 0
    from trainer.distributed.world import leads

    try:
        result = trainer.train()
    except (RunInterrupted, RunTerminated) as stop:
        if leads(trainer.arguments):
            _print_result(stop.result)
        raise
    except PeerFailed:  # the log, or the rank that failed, has named it
        exit_now()
    except OSError as error:  # most likely of the user's code, which needs the traceback
        show_exception(type(error), error, error.__traceback__)
        return 1
    if leads(trainer.arguments):
        _print_result(result)
    return 0


def _start_ranks(file: str, overrides: Sequence[str], config: RunConfig, processes: int) -> NoReturn:
    if config.arguments.strategy == "single":
        raise ArgumentsError(
            f"arguments.strategy: 'single' trains in each of the {processes} processes for itself; set it to 'auto'"
        )
    share_cores(processes)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    python = [sys.executable, "-P", "-m"]  # -P: see `events.process.Program.of_module`
    torchrun = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python"]
    os.execv(sys.executable, [*torchrun, *python, "trainer.cli.main", "train", file, *overrides])


def _print_result(result: RunResult) -> None:
    reason = f" ({result.reason})" if result.reason else ""
    plural = "s" if result.global_step != 1 else ""
    echo(f"{result.status} after {result.global_step} step{plural}{reason}")
    for name, place in (("run folder", result.run_dir), ("checkpoint", result.checkpoint)):
        if place is not None:
            echo(f"{name}: {place}")
    if result.best_checkpoint is not None:
        echo(f"best checkpoint: {result.best_checkpoint} ({result.best_metric:.6g})")


def _sizes_from_then(arguments: TrainerArguments) -> str:
    schedule = sorted(arguments.batch_size_schedule.items())
    return "".join(f"; {rows} rows after {done:,} {arguments.batch_size_interval}(s)" for done, rows in schedule)


def _print_summary(file: str, config: RunConfig, module: ModuleInterface) -> None:
    weights = sum(parameter.numel() for parameter in module.parameters())
    sinks = ["console"] if config.sinks is None else [one["sink"] for one in config.sinks]
    echo(
        f"{file} is valid; nothing was trained.",
        f"module:     {type(module).__module__}.{type(module).__qualname__}, {weights:,} parameters",
        f"steps:      {config.arguments.train_batch_size} rows each, in micro-batches of"
        f" {config.arguments.micro_batch_size}{_sizes_from_then(config.arguments)}",
        f"sinks:      {', '.join(sinks) or 'none'}",
        f"callbacks:  {', '.join(one['callback'] for one in config.callbacks) or 'none'}",
    )
    if warning := config.arguments.batch_size_warning():
        echo(f"warning:    {warning}")


# ------------------------------------------------------------------------------------------------ the help


def reference() -> str:
    """All settings of a run file, wrapped to the terminal's width."""
    width = max(60, min(120, shutil.get_terminal_size().columns))

    def wrapped(text: str, indent: int, further: int) -> list[str]:
        return textwrap.wrap(
            text, width, initial_indent=" " * indent, subsequent_indent=" " * further, break_on_hyphens=False
        )

    lines = [_INTRODUCTION]
    for title, about, prefix, kind in _sections():
        lines += [f"{title}:", *wrapped(about, 2, 2)]
        for headline, doc in _fields(kind, prefix):
            lines += [*wrapped(headline, 2, 6), *wrapped(doc, 6, 6)]
        lines.append("")
    return "\n".join(lines)


def _sections() -> Iterator[tuple[str, str, str, type]]:
    """The title of each group of keys, its description, the path before its keys, and the Struct with them."""
    from sinks.registry import sink_names, sink_type

    yield "keys", "", "", RunConfig
    yield "arguments", "Arguments of the training.", "arguments.", TrainerArguments
    yield "checkpoints", "Intervals and retention.", "checkpoints.", Checkpoints
    yield "init_from", "The weights of a new run.", "init_from.", InitFrom
    yield "journal", "The run's events, in the run folder.", "journal.", Journal
    for name in sink_names():
        try:
            kind = sink_type(name)
        except SinkMisconfigured as error:
            yield f"sink {name}", str(error), "", object
            continue
        about = (kind.__doc__ or "").strip().partition("\n\n")[0]
        yield f"sink {name}", _plain(about), "sinks.N.", kind


def _fields(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
    """The path, type and default of each key, and its description."""
    if not issubclass(kind, msgspec.Struct):
        return
    docs = field_docs(kind)
    for field in msgspec.structs.fields(kind):
        path = prefix + field.encode_name
        default = "" if field.required else f" (default: {_default_of(field)})"
        yield (
            f"{path}: {_plain(_KEY_TYPES.get(path) or describe_type(field.type))}{default}",
            _plain(docs.get(field.name, "")),
        )


_KEY_TYPES = {
    "module": "a string, or a mapping with factory and its options",
    "arguments": "a mapping",
    "sinks": "a list of strings, or of mappings with sink and its options, or None",
    "callbacks": "a list of strings, or of mappings with callback and its options",
    "checkpoints": "true or false, or a mapping",
    "journal": "true or false, or a mapping",
    "init_from": "a string, or a mapping, or None",
}


def _default_of(field: msgspec.structs.FieldInfo) -> str:
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if isinstance(value, msgspec.Struct):
        return "as below"
    if isinstance(value, float) or (isinstance(value, str) and value):
        return str(value)
    return msgspec.json.encode(value, enc_hook=str).decode()


def _plain(text: str) -> str:
    """Remove docstring markup, and use the words of YAML and JSON."""
    text = " ".join(re.sub("::$", ".", text.strip()).replace("`", "").split())
    return re.sub(r"\b(None|True|False)\b", lambda word: {"None": "null"}.get(word[0], word[0].lower()), text)
