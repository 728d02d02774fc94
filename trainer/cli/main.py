"""The command ``stagecast``.

Exit codes: 0 when the run finished, or the checkpoints are whole; 1 for an error, told in one sentence; 2 for wrong
arguments; 130 and 143 when SIGINT (Ctrl-C) or SIGTERM ended it. The first signal stops a run at its next step, and what
it has reached is still shown; a second one ends it at once.
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
from trainer.cli.text import complain, say, show_exception


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: The command line; None for that of the process.

    Raises:
        SystemExit: with code 2, for wrong arguments; with code 143 on a SIGTERM.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "train" and not any(word.startswith("-") for word in rest):
        options.overrides += rest  # those behind an option, which argparse does not take (up to Python 3.12)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of metrics and folders may be in any script
    sys.excepthook = show_exception
    try:
        code: int = options.run(options)
        if (flush := getattr(sys.stdout, "flush", None)) is not None:  # pythonw has no stdout
            flush()  # here, where a closed pipe is expected
        return code
    except KeyboardInterrupt as error:
        if not hasattr(error, "result"):  # of a `RunInterrupted`, which the command has printed
            complain("stagecast: ended at once")
        return 130
    except BrokenPipeError:  # whoever read it (`head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would say so at its end
        return 1
    except (StagecastError, OSError) as error:
        complain(f"stagecast {options.command}: error: {error}")
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
        " minute on two CPU cores. Ctrl-C stops it at the next step and shows what it has reached.",
        allow_abbrev=False,
    )
    demo.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps (default: about a minute's worth)")
    demo.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="of weights and order (default: 0)")
    demo.add_argument("--run-dir", metavar="FOLDER", help="the run's folder (default: runs/RUN_ID)")
    demo.set_defaults(run=_demo)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train what a file describes",
        description="Train what a YAML, TOML or JSON file describes: a module, how to train it, who\n"
        "is told. Ctrl-C stops it at the next step, with a checkpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    train.add_argument("file", metavar="FILE", help="the run's file (.yaml, .toml or .json)")
    train.add_argument("overrides", nargs="*", default=[], metavar="NAME=VALUE", help="instead of what the file says")
    train.add_argument("--check", action="store_true", help="build everything, say what is wrong, and train nothing")
    train.add_argument("-h", "--help", action=_ShowReference)
    train.set_defaults(run=_train)


class _ShowReference(argparse.Action):
    """Shows the help with all that can stand in the file, which is put together only then."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="show this, and end")

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
        "show what there is, the newest first",
        "The sizes of files are compared with what was written, their bytes are not (see verify). 'resumes here' is"
        " what resume='auto' takes; 'in line', what the run as it stands has come from; 'left behind', what somebody"
        " has gone back before.",
    )
    shown.add_argument("--json", action="store_true", help="print a JSON array, for scripts")
    verify = _add_action(
        actions,
        "verify",
        "read every byte and compare it with what was written",
        "The exit code is 1 if any is not whole.",
    )
    verify.add_argument("names", nargs="*", type=_checkpoint, metavar="NAME", help="which (step-500.a1; default: all)")
    export = _add_action(
        actions,
        "export",
        "write the module's state dict to a safetensors file",
        "Any reader of safetensors opens it: safetensors.torch.load_file gives the state dict. What is read is"
        " verified, and the file is there as a whole or not at all.",
    )
    export.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file to write")
    export.add_argument(
        "--name", type=_checkpoint, help="which (step-500.a1; default: the newest whole one that the run came from)"
    )
    export.add_argument("--force", action="store_true", help="replace the file if it is there")


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="feed the events of a run to sinks",
        description="Feed the events of a run, as they stand in its journal, to one or more sinks: to a tool that it"
        " did not have, or could not reach. Steps that were done again count once. If the run is under way, it is"
        " followed to its end. The exit code is 1 if a sink did not get everything, or if lines of the journal are"
        " damaged.",
        epilog="Options of a sink are those of its class: stagecast train --help lists them. A list or a mapping is"
        " written in brackets or braces, as in YAML: 'tags=[a, b]'.",
        allow_abbrev=False,
    )
    replay.add_argument("path", type=Path, metavar="RUN", help="the run's folder")
    replay.add_argument(
        "--to",
        nargs="+",
        action="append",
        required=True,
        metavar=("SINK", "OPTION=VALUE"),
        help="an installed sink, and its options; may be given several times",
    )
    replay.add_argument("--since", type=_natural, default=0, metavar="SEQ", help="leave out the events up to this one")
    replay.set_defaults(run=_replay)


def _add_watch(commands: Any) -> None:
    watch = commands.add_parser(
        "watch",
        help="show runs in a browser, as they happen",
        description="Serve a page that shows a run, or all runs of a folder, as they happen or as they were. It reads"
        " their journals, so it may be started and ended at any time.",
        epilog="The printed link holds a token, which watchers have to show: that of the environment variable"
        " STAGECAST_TOKEN, or a new one. An address that other machines reach is served only with STAGECAST_TOKEN.",
        allow_abbrev=False,
    )
    watch.add_argument("path", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER", help="(default: runs)")
    watch.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1)")
    watch.add_argument("--port", type=_natural, default=8765, metavar="N", help="0 takes a free one (default: 8765)")
    watch.add_argument("--commands", action="store_true", help="let watchers stop and pause runs, and have checkpoints")
    watch.add_argument(
        "--origin", action="append", default=[], metavar="URL", help="a site whose pages may talk to the server, too"
    )
    watch.add_argument("--no-token", action="store_true", help="let every user of this machine watch")
    watch.set_defaults(run=_watch)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write a run's charts to one HTML file",
        description="Write one HTML file with the charts, checkpoints and log of a run, to keep or to send to somebody."
        " It needs no server and asks nobody for anything. Several runs can be laid over each other in it.",
        allow_abbrev=False,
    )
    report.add_argument("path", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    report.add_argument("--out", type=Path, metavar="FILE.html", help="(default: RUN.html in the working directory)")
    report.add_argument("--force", action="store_true", help="replace the file if it is there")
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
        help="a run's folder, its folder of checkpoints, one checkpoint, or the run's address where they were uploaded"
        " to (s3://bucket/prefix/RUN_ID, gs://, az://, file://)",
    )
    return parser


def _demo(options: argparse.Namespace) -> int:
    # NumPy is no dependency of ours; torch says at each import that it could not find it.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    # Imported here, so that --help and errors of the command line do not wait for torch.
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
            f"validated on {len(text.val):,} characters from files that it does not learn from.\n\n",
            end="",  # one write, also where Python buffers none: who reads one line (`head -1`) has got all
            flush=True,
        )
        arguments = arguments_for(size, device, steps=options.steps, seed=options.seed)
        stop: RunInterrupted | RunTerminated | None = None
        try:
            result = Trainer(module, arguments, run_dir=options.run_dir).train()
        except (RunInterrupted, RunTerminated) as error:
            stop, result = error, error.result
        print(f"\nAfter {result.global_step} steps it writes:\n", flush=True)
        say(*(f"    | {line}" for line in module.write("def ", 400).expandtabs().rstrip().split("\n")))
        ledger = format_ledger(result.ledger)
        say("", "Where the loop's time went:", "", *ledger.split("\n"), "", f"Run folder: {result.run_dir}")
    except ArgumentsError as error:
        complain(*f"stagecast demo: error: {error}".split("\n"))
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
        complain(*f"stagecast train: error: {error}".split("\n"))
        return 2
    return 0


def _checkpoints(options: argparse.Namespace) -> int:
    from trainer.cli import checkpoints as cli_checkpoints  # with what reads them, which help need not wait for
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _version() -> str:
    try:
        return version("stagecast")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
