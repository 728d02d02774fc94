"""The command ``stagecast``.

Exit codes: 0 for success; 1 for an error or damaged checkpoints; 2 for wrong arguments; 130 and 143 after SIGINT
(Ctrl-C) or SIGTERM. The first signal stops a run at its next step and still prints the result; a second one aborts.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from events.checkpoint.manifest import CheckpointName
from events.errors import StagecastError
from trainer.cli.text import echo, echo_error, show_exception


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: The command line; None for that of the process.

    Raises:
        SystemExit: With code 2 for wrong arguments, and 143 after SIGTERM.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "train" and not any(word.startswith("-") for word in rest):
        options.overrides += rest  # overrides after an option, which argparse does not accept (up to Python 3.12)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of metrics and folders may be in any script
    sys.excepthook = show_exception
    try:
        code: int = options.run(options)
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
    except (StagecastError, OSError) as error:
        echo_error(f"stagecast {options.command}: error: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagecast", description="Train PyTorch modules over an event bus.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"stagecast {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_train(commands)
    _add_checkpoints(commands)
    _add_replay(commands)
    _add_watch(commands)
    _add_report(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small language model on the source of Python's standard library",
        description="Train a small character-level transformer on the source of Python's own standard library: about a"
        " minute on two CPU cores. Ctrl-C stops it at the next step and prints the result.",
        allow_abbrev=False,
    )
    demo.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps (default: about a minute of them)")
    demo.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="seed of weights and data (default: 0)")
    demo.add_argument("--run-dir", metavar="FOLDER", help="the run folder (default: runs/RUN_ID)")
    demo.set_defaults(run=_demo)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train the run that a file describes",
        description="Train the run of a YAML, TOML or JSON file, which names the module, its\n"
        "arguments and the sinks. Ctrl-C stops it at the next step, with a checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    train.add_argument("file", metavar="FILE", help="the run file (.yaml, .toml or .json)")
    train.add_argument("overrides", nargs="*", default=[], metavar="NAME=VALUE", help="override a setting of the file")
    train.add_argument("--check", action="store_true", help="build everything and report problems, without training")
    train.add_argument("-h", "--help", action=_ShowReference)
    train.set_defaults(run=_train)


class _ShowReference(argparse.Action):
    """Prints the help with all settings of a run file, generated on demand."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show this help and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from trainer.cli import train as cli_train

        parser.epilog = cli_train.reference()
        parser.print_help()
        parser.exit()


def _add_checkpoints(commands: Any) -> None:
    about = "list, verify and export the checkpoints of a run"
    group = commands.add_parser("checkpoints", help=about, description=f"{about.capitalize()}.", allow_abbrev=False)
    group.set_defaults(run=_checkpoints)
    actions = group.add_subparsers(dest="action", metavar="ACTION", required=True)
    shown = _add_action(
        actions,
        "list",
        "list checkpoints, newest first",
        "Only the sizes of files are checked, not their bytes (see verify). resume='auto' selects the checkpoint that"
        " 'resumes here'; those 'in line' are its ancestors; a resume from an earlier one has 'superseded' the others.",
    )
    shown.add_argument("--json", action="store_true", help="print a JSON array, for scripts")
    verify = _add_action(
        actions,
        "verify",
        "read every byte and compare it with the manifest's hash",
        "The exit code is 1 if a checkpoint is damaged.",
    )
    verify.add_argument("names", nargs="*", type=_checkpoint, metavar="NAME", help="such as step-500.a1 (default: all)")
    export = _add_action(
        actions,
        "export",
        "write the module's state dict to a safetensors file",
        "safetensors.torch.load_file returns the state dict. The checkpoint is verified, and the file is written"
        " atomically.",
    )
    export.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file to write")
    export.add_argument(
        "--name", type=_checkpoint, help="such as step-500.a1 (default: the newest valid one of the run's lineage)"
    )
    export.add_argument("--force", action="store_true", help="replace an existing file")


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="send the events of a run to sinks",
        description="Send the events in a run's journal to one or more sinks, such as a tracker that the run did not"
        " have or could not reach. Superseded steps are skipped. A running run is followed to its end. The exit code"
        " is 1 if a sink did not receive every event, or if lines of the journal are damaged.",
        epilog="stagecast train --help lists the options of each sink. Lists and mappings are written in brackets or"
        " braces, as in YAML: 'tags=[a, b]'.",
        allow_abbrev=False,
    )
    replay.add_argument("path", type=Path, metavar="RUN", help="the run folder")
    replay.add_argument(
        "--to",
        nargs="+",
        action="append",
        required=True,
        metavar=("SINK", "OPTION=VALUE"),
        help="an installed sink and its options; may be repeated",
    )
    replay.add_argument("--since", type=_natural, default=0, metavar="SEQ", help="skip the events up to this one")
    replay.set_defaults(run=_replay)


def _add_watch(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        help="show runs live in a browser",
        description="Serve a page that shows a run, or all runs in a folder, live or after their end. It reads their"
        " journals, so it may be started and stopped at any time.",
        epilog="The printed link contains the token that clients need: that of the environment variable"
        " STAGECAST_TOKEN, or a new one. Other machines are only served with STAGECAST_TOKEN.",
        allow_abbrev=False,
    )
    watch.add_argument("path", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="(default: runs)")
    watch.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1)")
    watch.add_argument("--port", type=_natural, default=8765, metavar="N", help="0 selects a free one (default: 8765)")
    watch.add_argument("--commands", action="store_true", help="allow clients to stop, pause and checkpoint runs")
    watch.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="another site whose pages may use the server"
    )
    watch.add_argument("--no-token", action="store_true", help="allow every user of this machine to watch")
    watch.set_defaults(run=_watch)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write a run's charts to one HTML file",
        description="Write one HTML file with the charts, checkpoints and log of a run. It needs no server and loads"
        " nothing from the network. Several runs are compared in one file.",
        allow_abbrev=False,
    )
    report.add_argument("path", type=Path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument("--out", type=Path, metavar="FILE.html", help="(default: RUN.html in the working directory)")
    report.add_argument("--force", action="store_true", help="replace an existing file")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from trainer.cli import report as cli_report

    return cli_report.report(options.path, options.out, force=options.force)


def _watch(options: argparse.Namespace) -> int:
    from trainer.cli import watch as cli_watch

    return cli_watch.watch(
        options.path,
        options.host,
        options.port,
        commands=options.commands,
        origins=options.origin,
        has_token=not options.no_token,
    )


def _replay(options: argparse.Namespace) -> int:
    from trainer.cli import replay as cli_replay

    return cli_replay.replay(options.path, options.to, options.since)


def _add_action(actions: Any, name: str, about: str, more: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name, help=about, description=f"{about.capitalize()}. {more}", allow_abbrev=False
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        help="a run folder, its folder of checkpoints, one checkpoint, or the run's address in a remote store"
        " (s3://bucket/prefix/RUN_ID, gs://, az://, file://)",
    )
    return parser


def _demo(options: argparse.Namespace) -> int:
    # NumPy is not a dependency, and torch warns at each import that it is missing.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    # Imported here, so that --help and wrong arguments do not wait for torch.
    import torch

    from sinks.format import format_ledger
    from trainer import Trainer
    from trainer.errors import ArgumentsError, RunInterrupted, RunTerminated
    from trainer.examples.charlm import CharLM, arguments_for, size_for
    from trainer.examples.text import load_text
    from trainer.run.device import resolve_device

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
            f"validated on {len(text.val):,} characters from other files.\n\n",
            end="",  # one write, even unbuffered, so that a reader of one line (`head -1`) does not break the pipe
            flush=True,
        )
        arguments = arguments_for(size, device, steps=options.steps, seed=options.seed)
        stop: RunInterrupted | RunTerminated | None = None
        try:
            result = Trainer(module, arguments, run_dir=options.run_dir).train()
        except (RunInterrupted, RunTerminated) as error:
            stop, result = error, error.result
        print(f"\nAfter {result.global_step} steps it writes:\n", flush=True)
        echo(*(f"    | {line}" for line in module.write("def ", 400).expandtabs().rstrip().split("\n")))
        ledger = format_ledger(result.ledger)
        echo("", "Where the loop's time went:", "", *ledger.split("\n"), "", f"Run folder: {result.run_dir}")
    except ArgumentsError as error:
        echo_error(*f"stagecast demo: error: {error}".split("\n"))
        return 2
    if stop is not None:
        raise stop
    return 0


def _train(options: argparse.Namespace) -> int:
    from trainer.cli import train as cli_train
    from trainer.errors import ArgumentsError

    try:
        cli_train.train(options.file, options.overrides, only_check=options.check)
    except ArgumentsError as error:
        echo_error(*f"stagecast train: error: {error}".split("\n"))
        return 2
    return 0


def _checkpoints(options: argparse.Namespace) -> int:
    from trainer.cli import checkpoints as cli_checkpoints  # here, so that --help does not wait for it
    from trainer.cli import export as cli_export

    match options.action:
        case "list":
            return cli_checkpoints.show(options.path, as_json=options.json)
        case "verify":
            return cli_checkpoints.verify(options.path, options.names)
        case _:
            return cli_export.export(options.path, options.out, options.name, force=options.force)


def _checkpoint(text: str) -> CheckpointName:
    name = CheckpointName.parse(text)
    if name is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a checkpoint name (expected e.g. step-500.a1)")
    return name


def _positive(text: str) -> int:
    number = _natural(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer >= 0")
    return int(text)


def _version() -> str:
    try:
        return version("stagecast")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
