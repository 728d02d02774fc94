# PYTHON_ARGCOMPLETE_OK
"""The command ``stagecast``.

Exit codes: 0 for success; 1 for an error or damaged checkpoints; 2 for wrong arguments; 130 and 143 after SIGINT
(Ctrl-C) or SIGTERM. The first signal stops a run at its next step and still prints the result; a second one aborts.

With argparse: cyclopts (four packages) saves few lines, and a command took 245 ms of CPU time to start instead of 170
(its help 290); typer needs pydantic, and takes 185 ms for two empty commands alone.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NoReturn

from events.errors import ArgumentsError, SinkMisconfigured, StagecastError
from events.strict import nearest
from trainer.cli.text import echo_error, show_exception

if TYPE_CHECKING:
    from events.checkpoint.manifest import CheckpointName

    _Commands = argparse._SubParsersAction["_Parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: The command line; None for that of the process.

    Raises:
        SystemExit: With code 2 for wrong arguments, and 143 after SIGTERM.
    """
    parser = _parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of metrics and folders may be in any script
    options = vars(parser.parse_args(arguments))
    command, run = options.pop("command"), options.pop("run")
    sys.excepthook = show_exception
    # NumPy is not a dependency, and torch warns at each import that it is missing.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        # Imported here, so that --help and wrong arguments do not wait for it.
        module, _, function = run.partition(".")
        code: int = getattr(importlib.import_module(f"trainer.cli.{module}"), function)(**options)
        if (flush := getattr(sys.stdout, "flush", None)) is not None:  # pythonw has no stdout
            flush()  # here, where a closed pipe is handled
        return code
    except KeyboardInterrupt as error:
        if not hasattr(error, "result"):  # the command has printed the result of a `RunInterrupted`
            echo_error("stagecast: aborted")
        return 130
    except BrokenPipeError:  # the reader (`head`) has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would warn at its exit
        return 1
    except (ArgumentsError, SinkMisconfigured) as error:
        echo_error(*f"stagecast {command}: error: {error}".split("\n"))
        return 2
    except (StagecastError, OSError) as error:
        echo_error(f"stagecast {command}: error: {error}")
        return 1


class _Parser(argparse.ArgumentParser):
    """Suggests the right name for a mistyped one, and reports an error in one line."""

    rest = ""
    """The list or optional argument that receives words after an option, which argparse does not accept (up to Python
    3.12)."""
    more: Callable[[], str] = str
    """Returns text that follows the help."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, rest = super().parse_known_args(args, namespace or argparse.Namespace())
        for word in rest:
            if word.startswith("-"):
                known = [name for action in self._actions for name in action.option_strings]
                self.error(f"{word} is not an option{_suggestion(word.partition('=')[0], known)}")
            if not self.rest:
                self.error(f"{word!r} is one argument too many")
        if rest:
            value = getattr(parsed, self.rest)
            if not isinstance(value, list) and (value is not None or len(rest) > 1):
                self.error(f"{rest[-1]!r} is one argument too many")
            setattr(parsed, self.rest, [*value, *rest] if isinstance(value, list) else rest[0])
        return parsed, []

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(None, f"{value!r} is not a command{_suggestion(value, list(action.choices))}")

    def error(self, message: str) -> NoReturn:
        echo_error(f"{self.prog}: error: {message}{'' if ';' in message else f'; see {self.prog} --help'}")
        self.exit(2)

    def format_help(self) -> str:
        return super().format_help() + self.more()


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = nearest(name, known, {})
    return f"; did you mean {near}?" if near is not None else ""


def _add(commands: _Commands, name: str, about: str, more: str = "") -> _Parser:
    """Add a command. The function ``{name}.{name}`` runs it: it takes the options by name and returns the exit code.

    Args:
        about: One clause, for the list of commands and the first line of the help.
    """
    text = f"{about[0].upper()}{about[1:]}. {more}"
    command: _Parser = commands.add_parser(name, help=about, description=text, allow_abbrev=False)
    command.set_defaults(run=f"{name}.{name}")
    return command


def _parser() -> _Parser:
    root = _Parser(prog="stagecast", description="Train PyTorch modules over an event bus.", allow_abbrev=False)
    root.add_argument("--version", action="version", version=f"stagecast {_version()}")
    commands = root.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    _add_demo_and_train(commands)
    _add_checkpoints(commands)
    _add_watch(commands)
    _add_runs(commands)
    _add_readers(commands)
    return root


def _add_demo_and_train(commands: _Commands) -> None:
    demo = _add(
        commands,
        "demo",
        "train a small language model on the source of Python's standard library",
        "This takes about a minute on two CPU cores. Ctrl-C stops the run at its next step and prints the result.",
    )
    demo.add_argument("--steps", type=_at_least(1), metavar="N", help="optimizer steps (default: about a minute)")
    demo.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    demo.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="seed of weights and data (default: 0)")
    demo.add_argument("--run-dir", metavar="FOLDER", help="the run folder (default: runs/RUN_ID)")
    train = _add(
        commands,
        "train",
        "train the run that a file describes",
        "The file is YAML, TOML or JSON, and names the module, its arguments and the sinks. Ctrl-C stops the run at its"
        " next step, with a checkpoint.",
    )
    train.rest, train.more = "overrides", _run_file_reference
    train.add_argument("file", metavar="FILE", help="the run file (.yaml, .toml or .json)")
    train.add_argument("overrides", nargs="*", default=[], metavar="NAME=VALUE", help="override a setting of the file")
    train.add_argument(
        "--processes",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="train on N devices of this machine, or N processes of its CPU, with torchrun (default: 1)",
    )
    train.add_argument("--check", action="store_true", help="build everything and report problems, without training")


def _run_file_reference() -> str:
    from trainer.cli.train import reference

    return f"\n{reference()}"


def _add_checkpoints(commands: _Commands) -> None:
    group = _add(commands, "checkpoints", "list, verify and export the checkpoints of a run")
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)
    shown = _add(
        actions,
        "list",
        "list checkpoints, newest first",
        "Only the sizes of files are checked, not their bytes (see verify). resume='auto' selects the checkpoint that"
        " 'resumes here'; those 'in line' are its ancestors; a resume from an earlier one has 'superseded' the others.",
    )
    verify = _add(
        actions,
        "verify",
        "read every byte and compare it with the manifest's hash",
        "The exit code is 1 if a checkpoint is damaged.",
    )
    export = _add(
        actions,
        "export",
        "write the module's weights to a safetensors file, or a folder of torch.distributed.checkpoint",
        "safetensors.torch.load_file returns the state dict. Tied tensors are written once, as load_model of"
        " safetensors and from_pretrained of transformers need them. The checkpoint is verified, and the file is"
        " written atomically. The parts of a sharded checkpoint are put together.",
    )
    for action in (shown, verify, export):
        action.add_argument(
            "path",
            metavar="PATH",
            help="a run folder, its folder of checkpoints, one checkpoint, or the run's address in a remote store"
            " (s3://bucket/prefix/RUN_ID, gs://, az://, file://)",
        )
    shown.set_defaults(run="checkpoints.show")
    verify.set_defaults(run="checkpoints.verify")
    shown.add_argument("--json", dest="as_json", action="store_true", help="print a JSON array, for scripts")
    verify.add_argument(
        "names", nargs="*", default=[], type=_checkpoint, metavar="NAME", help="such as step-500.a1 (default: all)"
    )
    _add_export(export)


def _add_export(export: _Parser) -> None:
    export.rest = "out"
    export.add_argument(
        "out", nargs="?", metavar="OUT.safetensors", help="the file to write (default: model.safetensors, or model-dcp)"
    )
    which = export.add_mutually_exclusive_group()
    which.add_argument("--name", type=_checkpoint, help="such as step-500.a1 (default: the newest valid one)")
    which.add_argument("--best", action="store_true", help="the one with the best metric (see Checkpoints(best=...))")
    export.add_argument("--strip-prefix", metavar="PREFIX", help="only tensors named PREFIX..., without it: net.")
    export.add_argument(
        "--every-name", action="store_true", help="write tied tensors under each of their names, for load_state_dict"
    )
    export.add_argument(
        "--averaged",
        action=argparse.BooleanOptionalAction,
        help="the weights averaged by EMA or SWA, not the trained ones (default: if the run has validated them)",
    )
    export.add_argument(
        "--format",
        choices=("safetensors", "dcp"),
        default="safetensors",
        help="dcp: a folder with every name, which torch.distributed.checkpoint.load reads (default: safetensors)",
    )
    export.add_argument("--force", action="store_true", help="replace an existing file, or such a folder")


def _add_readers(commands: _Commands) -> None:
    replay = _add(
        commands,
        "replay",
        "send the events of a run to sinks",
        "The events are read from the run's journal, for a sink such as a tracker that the run did not have or could"
        " not reach. Superseded steps are skipped. A running run is followed to its end. The exit code is 1 if a sink"
        " did not receive every event, or if lines of the journal are damaged. stagecast train --help lists the options"
        " of each sink. Lists and mappings are written in brackets or braces, as in YAML: 'tags=[a, b]'.",
    )
    # argparse would write --to first, where it would take RUN for an option of a sink.
    replay.usage = "stagecast replay [-h] RUN --to SINK [OPTION=VALUE ...] [--since SEQ]"
    replay.add_argument("run_dir", metavar="RUN", help="the run folder")
    replay.add_argument(
        "--to",
        nargs="+",
        action="append",
        required=True,
        metavar=("SINK", "OPTION=VALUE"),
        help="an installed sink and its options; may be repeated",
    )
    replay.add_argument("--since", type=_at_least(0), default=0, metavar="SEQ", help="skip the events up to this one")
    report = _add(
        commands,
        "report",
        "write runs with their charts to one HTML file, or their results as Markdown",
        "The file opens with all runs over each other: results, hyperparameters that differ, charts, commits and"
        " commands. It needs no server, loads nothing from the network, and prints on A4. It takes at most 1 MB for"
        " ordinary runs, images apart. As Markdown, the report has the tables, commits and commands.",
    )
    report.rest = "folders"
    report.add_argument("folders", nargs="+", metavar="RUN", help="a run folder, or a folder with runs at any depth")
    report.add_argument("--markdown", action="store_true", help="print Markdown, or write it to the file of --out")
    report.add_argument("--out", metavar="FILE", help="the file to write (default: RUN.html)")
    report.add_argument("--title", metavar="TEXT", help="(default: the run's name, or the number of runs)")
    report.add_argument("--notes", metavar="TEXT", help="text at the top, or a file with it (notes.md)")
    report.add_argument("--full", action="store_true", help="keep all points of the curves, however large the file is")
    report.add_argument("--force", action="store_true", help="replace an existing file")


def _add_watch(commands: _Commands) -> None:
    watch = _add(
        commands,
        "watch",
        "show runs live in a browser",
        "The page shows a run, or all runs in a folder, live or after their end. The server reads their journals, so it"
        " may be started and stopped at any time. The printed link contains the token that clients need: that of the"
        " environment variable STAGECAST_TOKEN, or a new one. Other machines are only served with STAGECAST_TOKEN."
        " Runs with the sink NATS are shown from anywhere: stagecast watch nats://HOST[/RUN].",
    )
    watch.add_argument(
        "folder",
        nargs="?",
        default="runs",
        metavar="FOLDER",
        help="a run folder, a folder of them, or the address of a NATS server (default: runs)",
    )
    watch.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1 (only this machine)")
    watch.add_argument(
        "--port", type=_at_least(0), default=8765, metavar="N", help="0 selects a free one (default: 8765)"
    )
    watch.add_argument("--commands", action="store_true", help="allow clients to stop, pause and checkpoint runs")
    watch.add_argument(
        "--origin",
        dest="origins",
        action="append",
        default=[],
        metavar="URL",
        help="another site whose pages may use the server; may be repeated",
    )
    watch.add_argument(
        "--alert",
        dest="alerts",
        action="append",
        default=[],
        metavar="TARGET",
        help="tell a person about runs that fail, are killed, stall, do not improve, fill the disk or end: desktop, the"
        " address of a webhook, a command, or the fields of sinks.Alert as JSON; may be repeated",
    )
    watch.add_argument(
        "--push-tokens",
        metavar="FILE",
        help="receive the runs of sinks Push into FOLDER/PROJECT; the file has a line PROJECT=TOKEN per project",
    )
    watch.add_argument("--no-token", action="store_true", help="allow every user of this machine to watch")


def _add_runs(commands: _Commands) -> None:
    runs = _add(
        commands,
        "runs",
        "print a table of runs",
        "It has all runs in a folder, at any depth: state, progress, metrics, the hyperparameters that differ, health."
        " config.NAME is a hyperparameter; last.NAME, best.NAME, min.NAME and max.NAME are values of a metric; a name"
        " alone is enough where it is clear. Conditions compare columns: 'lr > 0.01 and val_loss < 0.5',"
        " 'status == failed or not tags == baseline', 'note ~ \"warm.?up\"'.",
    )
    runs.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="default: runs")
    sort = runs.add_argument(
        "--sort", default="", metavar="COLUMNS", help="with commas; -NAME sorts the greatest first"
    )
    runs.add_argument("--reverse", action="store_true", help="print the last run first")
    runs.add_argument(
        "--filter",
        dest="filters",
        action="append",
        default=[],
        metavar="TEXT",
        help="a condition, or a regular expression on the name; may be repeated",
    )
    columns = runs.add_argument("--columns", default="", metavar="COLUMNS", help="with commas; 'help' lists all")
    for action in (sort, columns):
        action.completer = _complete_columns  # type: ignore[attr-defined]  # argcomplete's own
    form = runs.add_mutually_exclusive_group()
    form.add_argument("--json", dest="as_json", action="store_true", help="print a JSON array with all columns")
    form.add_argument("--csv", dest="as_csv", action="store_true", help="print CSV with all columns")


def _complete_columns(prefix: str, parsed_args: argparse.Namespace, **rest: object) -> list[str]:
    """Return the columns of the runs in the folder, behind those that were typed before the last comma."""
    from events.table.columns import Columns
    from events.table.table import RunTable

    before = prefix[: prefix.rfind(",") + 1]
    entries = RunTable(parsed_args.folder).look(first_s=1.0, per_run_s=0.1)
    return [f"{before}{name}" for name in Columns(entries).names]


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= minimum):
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= {minimum}")
        return int(text)

    return integer


def _checkpoint(text: str) -> CheckpointName:
    from events.checkpoint.manifest import CheckpointName

    if (name := CheckpointName.parse(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a checkpoint name; give one such as step-500.a1")
    return name


def _version() -> str:
    try:
        return version("stagecast")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
