"""``stagecast train``: a run from one file; its help is generated from the structs, without torch."""

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
from trainer.cli.text import echo, show_exception
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

Override any setting by its dotted path; list items are indexed from 0, and
values are YAML:

  stagecast train run.yaml arguments.epochs=5 sinks.1.path=b.csv sinks.2=wandb

All settings of a file:
"""

# ------------------------------------------------------------------------------------------------- the run


def train(path: str, overrides: Sequence[str], *, only_check: bool) -> RunResult | None:
    """Train the run of a file, or only check the file (None).

    Raises:
        ArgumentsError: The file, or a name in it, is invalid.
        CheckpointNotFound: There is no checkpoint to resume from.
        BaseException: Exceptions of `Trainer.train` and of the user's factories propagate.
    """
    # NumPy is not a dependency, and torch warns at each import that it is missing.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    prepared = prepare(load_run_config(path, overrides), path)
    if only_check:
        from trainer.trainer import check_resume

        check_resume(prepared.trainer)
        echo(*_summary(path, prepared))
        return None
    try:
        result = prepared.trainer.train()
    except (RunInterrupted, RunTerminated) as stop:
        _print_result(stop.result)
        raise
    except OSError as error:  # most likely of the user's code, which needs the traceback
        show_exception(type(error), error, error.__traceback__)
        sys.exit(1)
    _print_result(result)
    return result


def _print_result(result: RunResult) -> None:
    reason = f" ({result.reason})" if result.reason else ""
    echo(f"{result.status} after {result.global_step} steps{reason}")
    for name, place in (("run folder", result.run_dir), ("checkpoint", result.checkpoint)):
        if place is not None:
            echo(f"{name}: {place}")
    if result.best_checkpoint is not None:
        echo(f"best checkpoint: {result.best_checkpoint} ({result.best_metric:.6g})")


def _summary(path: str, prepared: Prepared) -> list[str]:
    module, config = prepared.trainer.module, prepared.config
    weights = sum(parameter.numel() for parameter in module.parameters())
    sinks = ["console"] if config.sinks is None else [one["sink"] for one in config.sinks]
    lines = [
        f"{path} is valid; nothing was trained.",
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
    """Empty without a default."""
    doc: str


def reference() -> str:
    """All settings of a run file, wrapped to the terminal's width."""
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
    yield "arguments", "Arguments of the training.", _fields_of(TrainerArguments, "arguments.")
    yield "checkpoints", "Intervals and retention.", _fields_of(Checkpoints, "checkpoints.")
    yield "journal", "The run's events, in the run folder.", _fields_of(Journal, "journal.")
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
    """Remove docstring markup, and use the words of YAML and JSON."""
    text = " ".join(re.sub("::$", ".", text.strip()).replace("`", "").split())
    return re.sub(r"\b(None|True|False)\b", lambda word: _WORDS[word[0]], text)


def _wrapped(text: str, width: int, indent: str, more: str | None = None) -> list[str]:
    more = indent if more is None else more
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=more, break_on_hyphens=False)
    return [line.replace(_NO_BREAK, " ") for line in lines]
