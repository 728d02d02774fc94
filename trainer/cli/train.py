"""``stagecast train``: a run from one file, and its help, which is put together from the structs, without torch."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from events.checkpoint.settings import Checkpoints
from events.errors import SinkMisconfigured
from events.field_docs import field_docs
from events.journal.writer import Journal
from events.protocol import RunResult
from trainer.arguments import TrainerArguments
from trainer.cli.run_config import Prepared, RunConfig, load_run_config, prepare
from trainer.cli.text import say, show_exception
from trainer.config import describe_type
from trainer.errors import RunInterrupted, RunTerminated

_INTRODUCTION = """\
A file:

  module: {factory: "jobs.mnist:build", width: 256}
  arguments: {epochs: 3, train_batch_size: 64, seed: 0}
  sinks: [console, {sink: csv, path: metrics.csv}]
  callbacks: ["jobs.mnist:Sample"]
  checkpoints: {every_epochs: 1}
  run_id: mnist
  resume: auto

On the command line, what is to be otherwise is named by its path, and what
stands in a list by its number, from 0; values are YAML:

  stagecast train run.yaml arguments.epochs=5 sinks.1.path=b.csv sinks.2=wandb

All that can stand in a file:
"""

# ------------------------------------------------------------------------------------------------- the run


def train(path: str, overrides: Sequence[str], *, only_check: bool) -> RunResult | None:
    """Train what a file describes, or only check it (None).

    Raises:
        ArgumentsError: The file, or what it names, cannot be used.
        CheckpointNotFound: There is nothing to resume from where the file says.
        BaseException: what `Trainer.train`, or a factory of the user's, raised.
    """
    # NumPy is no dependency of ours; torch says at each import that it could not find it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    prepared = prepare(load_run_config(path, overrides), path)
    if only_check:
        from trainer.trainer import check_resume

        check_resume(prepared.trainer)
        say(*_summary(path, prepared))
        return None
    try:
        result = prepared.trainer.train()
    except (RunInterrupted, RunTerminated) as stop:
        _print_result(stop.result)
        raise
    except OSError as error:  # of the user's own code, most likely: a sentence would not say where
        show_exception(type(error), error, error.__traceback__)
        sys.exit(1)
    _print_result(result)
    return result


def _print_result(result: RunResult) -> None:
    reason = f" ({result.reason})" if result.reason else ""
    say(f"{result.status} after {result.global_step} steps{reason}")
    for name, place in (("run folder", result.run_dir), ("checkpoint", result.checkpoint)):
        if place is not None:
            say(f"{name}: {place}")
    if result.best_checkpoint is not None:
        say(f"best checkpoint: {result.best_checkpoint} ({result.best_metric:.6g})")


def _summary(path: str, prepared: Prepared) -> list[str]:
    module, config = prepared.trainer.module, prepared.config
    weights = sum(parameter.numel() for parameter in module.parameters())
    sinks = ["console"] if config.sinks is None else [one["sink"] for one in config.sinks]
    lines = [
        f"{path} is in order; nothing was trained.",
        f"module:     {type(module).__module__}.{type(module).__qualname__}, {weights:,} parameters",
        f"steps:      {config.arguments.train_batch_size} rows each, in {config.arguments.accumulation_steps} of"
        f" {config.arguments.micro_batch_size}",
        f"sinks:      {', '.join(sinks) or 'none'}",
        f"callbacks:  {', '.join(one['callback'] for one in config.callbacks) or 'none'}",
    ]
    if warning := config.arguments.batch_size_warning():
        lines.append(f"warning:    {warning}")
    return lines


# ------------------------------------------------------------------------------------------------ the help


class Field(NamedTuple):
    """One key of the file."""

    path: str
    type: str
    default: str
    """Empty if there is none."""
    doc: str


def reference() -> str:
    """Everything that may stand in the file of a run, for the terminal as wide as it is."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    parts = [_INTRODUCTION]
    for title, about, fields in _sections():
        parts += [f"{title}:", *_wrapped(about, width, "  ")]
        for field in fields:
            parts += _wrapped(_headline(field), width, "  ", "      ")
            parts += _wrapped(field.doc, width, "      ")
        parts.append("")
    return "\n".join(parts)


def _headline(field: Field) -> str:
    default = f" (default: {field.default})".replace("default: ", f"default:{_NO_BREAK}") if field.default else ""
    return f"{field.path}: {field.type}{default}"


def _sections() -> Iterator[tuple[str, str, list[Field]]]:
    yield "keys", "", _fields_of(RunConfig, "")
    yield "arguments", "How to train.", _fields_of(TrainerArguments, "arguments.")
    yield "checkpoints", "When they are taken, and how many are kept.", _fields_of(Checkpoints, "checkpoints.")
    yield "journal", "The run's events, in its folder.", _fields_of(Journal, "journal.")
    registry: Any = importlib.import_module("sinks.registry")
    for name in registry.sink_names():
        try:
            kind = registry.sink_type(name)
        except SinkMisconfigured as error:
            yield f"sink {name}", str(error), []
            continue
        about = (kind.__doc__ or "").strip().partition("\n\n")[0]
        yield f"sink {name}", _plain(about), _fields_of(kind, "sinks.N.")


def _fields_of(kind: type[msgspec.Struct], prefix: str) -> list[Field]:
    documented = field_docs(kind)
    if kind is TrainerArguments:
        documented = {field.name: field.doc for field in TrainerArguments.describe()}
    return [
        Field(
            prefix + field.encode_name,
            _plain(_KEY_TYPES.get(prefix + field.name) or describe_type(field.type)),
            _default_of(field),
            _plain(documented.get(field.name, "")),
        )
        for field in msgspec.structs.fields(kind)
    ]


_NO_BREAK = "\N{NO-BREAK SPACE}"
_WORDS = {"None": "null", "True": "true", "False": "false"}
_KEY_TYPES = {
    "module": "a string, or a mapping with factory and its options",
    "arguments": "a mapping",
    "sinks": "a list of strings, or of mappings with sink and its options, or None",
    "callbacks": "a list of strings, or of mappings with callback and its options",
    "checkpoints": "true or false, or a mapping",
    "journal": "true or false, or a mapping",
}


def _default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return ""
    if field.default is not msgspec.NODEFAULT:
        value = field.default
    else:
        value = field.default_factory()
    if isinstance(value, msgspec.Struct):
        return "as below"
    if isinstance(value, float) or (isinstance(value, str) and value):
        return str(value)
    return msgspec.json.encode(value, enc_hook=str).decode()


def _plain(text: str) -> str:
    """Without the marks of docstrings, and with the words of the file's languages."""
    text = " ".join(re.sub("::$", ".", text.strip()).replace("`", "").split())
    return re.sub(r"\b(None|True|False)\b", lambda word: _WORDS[word[0]], text)


def _wrapped(text: str, width: int, indent: str, more: str | None = None) -> list[str]:
    more = indent if more is None else more
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False)
    return [line.replace(_NO_BREAK, " ") for line in lines]
