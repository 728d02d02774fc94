"""Read a run file, and build the trainer that it describes.

A string is short for a mapping without options: ``sinks: [console]`` is ``sinks: [{sink: console}]``. Options are keys
of the same mapping as the name, so that each has a path for overrides: ``sinks.0.path=metrics.csv``.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import msgspec

from events.checkpoint.settings import Checkpoints
from events.errors import SinkMisconfigured
from events.journal.writer import Journal
from events.packages import check_packages
from events.sink import Place, Sink
from events.strict import Strict
from trainer.arguments import TrainerArguments, trainer_aliases
from trainer.checkpoint.init_from import InitFrom
from trainer.config import apply_overrides, decode, load_config
from trainer.errors import ArgumentsError

if TYPE_CHECKING:
    from trainer.trainer import Trainer

_NAMES = {"module": "factory", "sinks": "sink", "callbacks": "callback"}
"""The option with the name of the factory or sink, by its key in the file."""
_SWITCHES = ("checkpoints", "journal")
_Kind = TypeVar("_Kind")


class RunConfig(Strict, frozen=True, kw_only=True):
    """The settings of a run file. Only ``module`` is required."""

    argument_aliases: ClassVar[Mapping[str, str]] = trainer_aliases("write arguments.{}")

    module: dict[str, Any]
    """The trained module. factory: a function or class that returns it, as "package.module:name", also in the working
    directory. The other options are its keyword arguments. A string is a factory without options."""
    arguments: TrainerArguments = msgspec.field(default_factory=TrainerArguments)
    """Arguments of the training: see arguments below."""
    sinks: list[dict[str, Any]] | None = None
    """Receivers of the events. sink: the name of an installed sink; the other options are its own (see sinks below). A
    string is a sink without options. None: only the console; []: none."""
    sinks_in: Place = "thread"
    """The place of sinks: a thread each, or one process for all of them."""
    callbacks: list[dict[str, Any]] = msgspec.field(default_factory=list)
    """Callbacks. callback: a class, or a function that returns one, as "package.module:name"; the other options are its
    keyword arguments. A callback with a parameter named module receives the module."""
    checkpoints: Checkpoints | bool = True
    """Settings of checkpoints: see checkpoints below. true: the defaults; false disables them."""
    journal: Journal | bool = True
    """Whether the run stores its events on disk: see journal below."""
    run_id: str | None = None
    """The run's name. None: a new name."""
    run_dir: str | None = None
    """The run folder. None: runs/RUN_ID below the working directory."""
    resume: str | None = None
    """The checkpoint to resume from: auto (the newest valid one of this run, or a new run if there is none), best (the
    one with the best metric), the path of a checkpoint or of a run folder, or an address in a remote store. None: start
    a new run."""
    init_from: InitFrom | str | None = None
    """The source of a new run's weights: a path or an address, or a mapping with it as path: see init_from below."""
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    """Further hyperparameters to record, beside the options of the module, which are recorded in any case; where both
    have a name, this value is recorded."""


def load_run_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> RunConfig:
    """Read a run file strictly, without torch.

    Raises:
        ArgumentsError: The file cannot be read, or has unknown keys or wrong values; it names all of them.
    """
    overrides = list(overrides)
    values = _expanded(load_config(path))
    problems: list[str] = []
    for override in overrides:
        values = _expanded(apply_overrides(values, [override], problems))
    for key in _SWITCHES:
        if values.get(key) == {}:
            values[key] = True  # unlike settings, True does not require a run folder
    source = f"{path} with {', '.join(overrides)}" if overrides else str(path)
    return decode(RunConfig, values, source, known_problems=problems)


def _expanded(config: Mapping[str, object]) -> dict[str, object]:
    """Replace strings, and true, by mappings, so that overrides can name their options."""
    result = dict(config)
    for key, name in _NAMES.items():
        value = result.get(key)
        if isinstance(value, str) and key == "module":
            result[key] = {name: value}
        elif isinstance(value, list):
            result[key] = [{name: one} if isinstance(one, str) else one for one in value]
    for key in _SWITCHES:
        if result.get(key) is True:
            result[key] = {}
    if isinstance(path := result.get("init_from"), str):
        result["init_from"] = {"path": path}
    return result


def prepare(config: RunConfig, source: str) -> Trainer:
    """Build the sinks, the module, the callbacks and the trainer. Imports torch, and calls the user's factories.

    The random generators are seeded before, if ``arguments.seed`` is set, because they initialise the weights.

    Args:
        source: The file's path, for messages.

    Raises:
        ArgumentsError: A name does not exist, or its options are wrong.
        BaseException: Exceptions of a factory propagate unchanged.
    """
    try:
        return _build(config)
    except ArgumentsError as error:
        raise ArgumentsError(f"{source}: {error}") from error


def _build(config: RunConfig) -> Trainer:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        check_packages()
    except ImportError as error:
        raise ArgumentsError(str(error)) from error
    problems: list[str] = []
    sinks = _each(_sink, {f"sinks.{number}": one for number, one in enumerate(config.sinks or [])}, problems)
    callbacks = {f"callbacks.{number}": one for number, one in enumerate(config.callbacks)}
    factories = _each(_find, {"module": config.module} | callbacks, problems)
    if problems:
        raise ArgumentsError("; ".join(problems))

    from trainer.data.rng import seed_everything
    from trainer.module_interface import CallbackInterface, ModuleInterface
    from trainer.run.device import resolve_device
    from trainer.run.record import factory_config
    from trainer.trainer import Trainer

    resolve_device(config.arguments.device)  # before a factory that may take long
    if config.arguments.seed is not None:
        seed_everything(config.arguments.seed)
    module = _called(factories[0], {}, ModuleInterface)  # type: ignore[type-abstract]  # of a subclass
    return Trainer(
        module,
        config.arguments,
        callbacks=[_called(one, {"module": module}, CallbackInterface) for one in factories[1:]],
        sinks=sinks if config.sinks is not None else None,
        sinks_in=config.sinks_in,
        journal=config.journal,
        run_id=config.run_id,
        run_dir=config.run_dir,
        checkpoints=config.checkpoints,
        resume=config.resume,
        init_from=config.init_from,
        config=factory_config(factories[0].options) | config.config,
    )


class _Factory(NamedTuple):
    """A factory of the user's, with its options."""

    where: str
    """Its path in the file, and its name."""
    function: Callable[..., object]
    options: dict[str, object]


def _each(
    build: Callable[[str, Mapping[str, object]], _Kind],
    described: Mapping[str, Mapping[str, object]],
    problems: list[str],
) -> list[_Kind]:
    """Build from the options at each path in the file; add failures to ``problems``."""
    built = []
    for path, options in described.items():
        try:
            built.append(build(path, options))
        except ArgumentsError as error:
            problems.append(str(error))
    return built


def _sink(path: str, options: Mapping[str, object]) -> Sink:
    from sinks.registry import build_sink, sink_names

    name = options.get("sink")
    if not isinstance(name, str):
        raise ArgumentsError(f"{path}: the name, sink, is missing; installed are {', '.join(sink_names())}")
    try:
        return build_sink(name, _without(options, "sink"))
    except (SinkMisconfigured, ValueError) as error:
        raise ArgumentsError(f"{path}: {error}") from error


def _find(path: str, options: Mapping[str, object]) -> _Factory:
    """Import a factory of the user's."""
    option = _NAMES[path.partition(".")[0]]
    name = options.get(option)
    where = f"{path}.{option} = {name!r:.80}"
    package, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (package and attribute):
        raise ArgumentsError(f'{where}: must look like "package.module:name"')
    try:
        module = importlib.import_module(package)
    except (Exception, SystemExit) as error:  # whatever the user's module does when it is imported
        raise ArgumentsError(f"{where}: cannot import {package}: {_described(error, package)}") from error
    try:
        found: object = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        file = getattr(module, "__file__", None) or "which has no file"
        raise ArgumentsError(f"{where}: {package} ({file}) has no {attribute}") from error
    if not callable(found):
        raise ArgumentsError(f"{where}: is {found!r:.80}, which cannot be called; name a function or a class")
    return _Factory(where, found, _without(options, option))


def _without(options: Mapping[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in options.items() if key != name}


def _called(factory: _Factory, offered: Mapping[str, object], kind: type[_Kind]) -> _Kind:
    """Call a factory with its options, and with those offered arguments that its signature names."""
    where, options = factory.where, dict(factory.options)
    try:
        signature = inspect.signature(factory.function)
    except ValueError:  # written in C, without a signature
        signature = inspect.signature(lambda **options: None)
    for name in offered.keys() & signature.parameters.keys():
        if name in options:
            raise ArgumentsError(f"{where}: the option {name} is set by the run; remove it")
        options[name] = offered[name]
    try:
        signature.bind_partial(**options)  # first, because a misspelt option is also a missing one
        signature.bind(**options)
    except TypeError as error:
        takes = signature.replace(return_annotation=signature.empty)
        raise ArgumentsError(f"{where}: {error}; it takes {takes}") from error
    built = factory.function(**options)
    if not isinstance(built, kind):
        raise ArgumentsError(f"{where}: returned {built!r:.80}, which is not a {kind.__name__}")
    return built


def _described(error: BaseException, package: str) -> str:
    """Describe an error raised while the user's code was imported, with its place."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # its text contains the place
        return text
    if isinstance(error, ModuleNotFoundError) and f"{package}.".startswith(f"{error.name}."):
        return f"there is no module {error.name}, neither in {os.getcwd()} nor among the installed ones"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = frames[-1] if frames and frames[-1].filename != __file__ else None
    return text if place is None else f"{text} ({place.filename}, line {place.lineno})"
