"""Checks the arguments of a `Trainer` before anything is opened. Each problem names the argument and a fix."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from events.checkpoint.objects import parse_url, run_url
from events.checkpoint.settings import Checkpoints
from events.errors import SinkMisconfigured, UploadError
from events.journal.writer import Journal
from events.masking import masked
from events.sink import Delivery, delivery_of, require
from events.text import name_problem
from trainer.arguments import TrainerArguments
from trainer.averaging import AveragedWeights
from trainer.callback_interface import CallbackInterface
from trainer.checkpoint.fetch import KEYWORDS
from trainer.checkpoint.init_from import InitFrom
from trainer.errors import ArgumentsError
from trainer.module_interface import ModuleInterface
from trainer.run.contract_checks import check_contract
from trainer.run.observers import Callback, split


def members(name: str, given: Any, problems: list[str]) -> tuple[Any, ...]:
    """Return the given callbacks or sinks; a single object instead of a list is a problem."""
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)):
        return tuple(given)
    problems.append(f"{name} must be a list, not {shown(given)}; {_instead(name, given)}")
    return ()


def _instead(name: str, given: Any) -> str:
    """Return the likely correct argument for callbacks or sinks."""
    if isinstance(given, str):
        found = _by_name(name, given)
        home = "trainer.callbacks" if name == "callbacks" else "sinks"
        if found is not None:
            return f"write {name}=[{found}({_OPTIONS.get(found, '')})] (from {home} import {found})"
        return f"write {name}=[...] with objects, such as those of {home}"
    if isinstance(given, type):
        takes = inspect.signature(given).parameters.values()
        needs = any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in takes)
        return f"write {name}=[{given.__name__}({'...' if needs else ''})]"
    if given is None or isinstance(given, bool | int | float | bytes | Mapping):
        return "put a single one in brackets"
    return f"put a single one in brackets: {name}=[...]"


_OPTIONS = {
    "EMA": "module",
    "LearningRateMonitor": "module",
    "ModelStatistics": "module",
    "SWA": "module, start_epoch=...",
}


def _by_name(name: str, text: str) -> str | None:
    """Return our class for a name that other trainers accept: ``"tensorboard"``."""
    package: Any = importlib.import_module("trainer.callbacks" if name == "callbacks" else "sinks")
    plain = text.lower().replace("_", "").replace("-", "").replace(" ", "")
    plain = {"tb": "tensorboard", "wb": "wandb", "otel": "opentelemetry"}.get(plain, plain)
    return next((one for one in package.__all__ if one.lower() in (plain, plain.removesuffix("logger"))), None)


def numbered(name: str, given: tuple[Any, ...]) -> dict[str, Any]:
    """Return the members of a list by the names that messages give them: ``sinks[0]``."""
    return {f"{name}[{number}]": one for number, one in enumerate(given)}


def check_members(module: Any, arguments: Any, callbacks: tuple[Any, ...], problems: list[str]) -> None:
    """Check types, and the packages that they need."""
    if not isinstance(module, ModuleInterface):
        hint = f"; write {module.__name__}()" if isinstance(module, type) else ""
        problems.append(f"module must be an instance of a ModuleInterface, not {shown(module)}{hint}")
    if not isinstance(arguments, TrainerArguments):
        problems.append(
            f"arguments must be TrainerArguments, not {shown(arguments)}; TrainerArguments.from_dict builds them"
        )
    elif arguments.system_interval_s is not None:
        try:
            require("psutil", "system", "TrainerArguments(system_interval_s=...)")
        except SinkMisconfigured as error:
            problems.append(str(error))
    sound: list[CallbackInterface] = []
    for number, callback in enumerate(callbacks):
        target, delivery = split(callback)
        if not isinstance(target, CallbackInterface) or not isinstance(delivery, Delivery | None):
            problem = f"callbacks[{number}] must be a CallbackInterface, or a pair of one and a Delivery, not"
            problems.append(f"{problem} {shown(callback)}{_hint('callbacks', target)}")
        else:
            sound.append(target)
            _check_callback_delivery(f"callbacks[{number}] ({type(target).__name__})", delivery, problems)
    validating = [type(one).__name__ for one in sound if isinstance(one, AveragedWeights) and one.validate]
    if len(validating) > 1:
        problems.append(
            f"{' and '.join(validating)} have validate=True, but a validation uses one average; give the others"
            f" validate=False"
        )
    if isinstance(module, ModuleInterface):
        check_contract(module, sound, problems)


def check_sinks(sinks: Mapping[str, Any], sinks_in: Any, journal: Any, problems: list[str]) -> None:
    """Check sinks by their names in messages: types, packages that they need, and whether they can run there."""
    for name, sink in sinks.items():
        target, delivery = split(sink)
        if isinstance(target, Journal):
            problems.append(f"{name} is a Journal, of which a run has one: give it as journal=")
        is_sink = callable(getattr(target, "open", None)) and not isinstance(target, type)
        if not is_sink or not isinstance(delivery, Delivery | None):
            problem = f"{name} must be a sink (an object with open(run)) or a pair of one and a Delivery, not"
            problems.append(f"{problem} {shown(sink)}{_hint('sinks', target)}")
        elif callable(check := getattr(target, "check", None)):
            try:
                check()
            except SinkMisconfigured as error:
                problems.append(f"{name}: {error}")
    _check_deliveries(sinks, sinks_in, journal, problems)


def _check_callback_delivery(name: str, delivery: Delivery | None, problems: list[str]) -> None:
    if delivery is not None and delivery.types is not None:
        problems.append(f"{name} has Delivery(types=...), but its hooks select its events; remove types")
    if delivery is not None and delivery.overflow == "catch_up":
        problems.append(
            f"{name} cannot catch up from the journal, which holds no outputs; give it overflow='block' (the default,"
            f" which drops nothing) or 'drop_oldest'"
        )


def _hint(name: str, given: Any) -> str:
    """Return the likely correct member of a list."""
    if isinstance(given, CallbackInterface):
        return "; give it as callbacks=[...]"
    if name == "callbacks" and callable(getattr(given, "open", None)) and not isinstance(given, type):
        return "; give it as sinks=[...]"
    if isinstance(given, type) or (isinstance(given, str) and _by_name(name, given) is not None):
        return f"; {_instead(name, given)}"
    return ""


def _check_deliveries(sinks: Mapping[str, Any], sinks_in: Any, journal: Any, problems: list[str]) -> None:
    if sinks_in not in ("thread", "process"):
        problems.append(f"sinks_in must be 'thread' or 'process', not {shown(sinks_in)}")
    for place, sink in sinks.items():
        target, delivery = split(sink)
        delivery = delivery if isinstance(delivery, Delivery) else delivery_of(target)
        if not callable(getattr(target, "open", None)):
            continue
        name = f"{place} ({type(target).__name__})"
        if (delivery.runs_in or sinks_in) != "process":
            unkept = sorted(kind.__name__ for kind in delivery.types or () if not kind.journalled)
            if delivery.overflow == "catch_up" and journal is None:
                problems.append(
                    f"{name} has overflow='catch_up', which reads the journal; keep the journal, or give"
                    f" ({type(target).__name__}(...), Delivery(overflow='drop_oldest'))"
                )
            elif delivery.overflow == "catch_up" and unkept:
                problems.append(
                    f"{name} has overflow='catch_up', but the journal does not keep {', '.join(unkept)}; give"
                    f" overflow='drop_oldest' or 'block'"
                )
            continue
        if journal is None:
            problems.append(
                f"{name} runs in the sink host, which reads the journal; keep the"
                f" journal, or give ({type(target).__name__}(...), Delivery(runs_in='thread'))"
            )
            continue
        host: Any = importlib.import_module("sinks.host.child")
        try:
            host.HostedSink.of("", target, delivery, 0)
        except SinkMisconfigured as error:
            problems.append(f"{place}: {error}")


def check_folder(journal: Any, run_id: Any, run_dir: Any, problems: list[str]) -> None:
    """Check the run's name and folder."""
    if not isinstance(journal, Journal | None):
        problems.append(f"journal must be True, False or a Journal, not {shown(journal)}")
    # The name becomes a folder in runs/, and must not point out of it.
    if run_id is not None and (
        not isinstance(run_id, str) or run_id in ("", ".", "..") or {"/", os.sep, "\0"} & set(run_id)
    ):
        problems.append(f"run_id must be a name without slashes, not {shown(run_id)}; run_dir chooses the folder")
    elif isinstance(run_id, str) and (problem := name_problem(run_id)) is not None:
        problems.append(f"run_id={run_id!r:.80} {problem}; give a short, printable name")
    if run_dir is not None and not (isinstance(run_dir, str | os.PathLike) and os.fspath(run_dir)):
        problems.append(f"run_dir must be the path of a folder, not {shown(run_dir)}")


def check_checkpoints(checkpoints: Any, resume: Any, init_from: Any, problems: list[str]) -> None:
    """Check the arguments of checkpoints, and of the start of the run."""
    if not isinstance(checkpoints, bool | Checkpoints):
        problems.append(f"checkpoints must be True, False or Checkpoints(...), not {shown(checkpoints)}")
    elif isinstance(checkpoints, Checkpoints) and checkpoints.upload is not None:
        try:
            parse_url(checkpoints.upload)
        except UploadError as error:
            problems.append(f"Checkpoints(upload=...): {error}")
    if not isinstance(resume, str | os.PathLike | None) or resume == "":
        problems.append(f"resume must be 'auto', 'best', a path, an address or None, not {shown(resume)}")
    if not isinstance(init_from, str | os.PathLike | InitFrom | None) or init_from == "":
        problems.append(f"init_from must be a path, an address, InitFrom(...) or None, not {shown(init_from)}")


def check_named(run_id: Any, run_dir: Any, resume: Any, problems: list[str]) -> None:
    """Check that a run that looks for its own checkpoints has a name."""
    if resume in KEYWORDS and run_id is None and run_dir is None:
        problems.append(f"resume={resume!r} needs to know the run; give run_id or run_dir")


def check_upload(upload: str, run_id: str, run_dir: Path) -> None:
    """Check that the upload folder is not the run folder."""
    address = parse_url(run_url(upload, run_id))
    there, here = Path(address.prefix).resolve(), run_dir.resolve()
    if address.scheme == "file" and (there.is_relative_to(here) or here.is_relative_to(there)):
        raise ArgumentsError(
            f"Checkpoints(upload={upload!r}) would upload to {there}, which overlaps the run folder {here}; choose"
            f" another place"
        )


def shown(value: Any) -> str:
    """Return a value's text for a message."""
    return f"{masked(repr(value)):.80}" if not isinstance(value, type) else f"the class {value.__name__}"


def common_facts(
    task: str, module: torch.nn.Module, arguments: TrainerArguments, callbacks: Iterable[Callback]
) -> dict[str, object]:
    """What must be the same on all ranks of a run, by name."""
    named = arguments.to_dict()
    del named["device"], named["compile_options"]  # each rank has its own, and its own functions
    facts: dict[str, object] = {"the task": task, "the module": type(module).__qualname__}
    for name, parameter in module.named_parameters():
        is_lazy = isinstance(parameter, torch.nn.parameter.UninitializedParameter)
        facts[f"the parameter {name}"] = (parameter.dtype, "uninitialized" if is_lazy else tuple(parameter.shape))
    return facts | {"callbacks": [type(split(one)[0]).__qualname__ for one in callbacks]} | named
