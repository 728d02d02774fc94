"""The checks of the arguments of `launch` and of factories, before a process starts."""

from __future__ import annotations

import inspect
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from events.checkpoint.manifest import CheckpointName
from events.strict import unknown_names
from events.text import is_encodable
from trainer.checkpoint.fetch import KEYWORDS

MOST_PROCESSES = 1_024
_OF_RANKS = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
_PLAIN = (type(None), bool, int, float, str, bytes)


def absolute(resume: str) -> str:
    """A path, as seen from another working directory; a keyword, an address and a checkpoint's name stay."""
    name = CheckpointName.parse(resume) is not None and not os.path.exists(resume)
    return resume if resume in KEYWORDS or "://" in resume or name else os.path.abspath(resume)


def problems_of(factory: object, run_id: object, run_dir: object, resume: object, env: object) -> Iterable[str]:
    if sys.platform == "win32":
        yield "runs can be launched on POSIX systems only; Trainer.run works everywhere"
    module, colon, name = factory.partition(":") if isinstance(factory, str) else ("", "", "")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        yield f"factory must be 'package.module:function', not {factory!r:.80}"
    elif module == "__main__":
        yield f"{factory!r} is in the script that runs here, which another process cannot import: move it to a module"
    if run_id is not None and not (isinstance(run_id, str) and run_id and is_encodable(run_id)):
        yield f"run_id must be a name, not {run_id!r:.80}"
    for place, path in (("run_dir", run_dir), ("resume", resume)):
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
        if path is not None and not (isinstance(text, str) and text and is_encodable(text)):
            yield f"{place} must be a path in Unicode, not {path!r:.80}"
    if env is not None and not (
        isinstance(env, Mapping) and all(isinstance(part, str) for pair in env.items() for part in pair)
    ):
        yield f"env must map names to texts, not {env!r:.80}"
    elif env is not None:
        for name, value in env.items():
            if not name or "=" in name or "\0" in name + value:
                yield f"env: no environment has {name!r:.80}={value!r:.80}: no '=' in a name, and no NUL"


def problems_of_ranks(processes: object, env: object) -> Iterable[str]:
    if type(processes) is not int or not 1 <= processes <= MOST_PROCESSES:
        yield f"processes must be a number from 1 to {MOST_PROCESSES:,}, not {processes!r:.80}"
    elif processes > 1 and isinstance(env, Mapping):
        for name in _OF_RANKS & env.keys():
            yield f"env: {name} is set for each of the {processes} processes; remove it"


def encoded(arguments: object, problems: list[str]) -> bytes:
    """The arguments as msgpack, which brings them over as what they are (but tuples as lists)."""
    if not isinstance(arguments, Mapping):
        problems.append(f"arguments must map names to values, not {arguments!r:.80}")
        return b""
    arguments = dict(arguments)
    try:
        before = len(problems)
        problems += [f"arguments{where}" for where in _unplain(arguments, "")]
        return msgspec.msgpack.encode(arguments) if len(problems) == before else b""
    except (RecursionError, OverflowError, ValueError) as error:  # a cycle, 2**64, a lone surrogate
        problems.append(f"arguments cannot be encoded: {error}")
        return b""


def _unplain(value: object, where: str) -> Iterable[str]:
    """Describe each value that is not plain."""
    if type(value) is dict:
        for key, part in value.items():
            if not isinstance(key, str):
                yield f"{where} has the key {key!r:.80}: keys must be texts"
            yield from _unplain(part, f"{where}[{key!r:.80}]")
    elif isinstance(value, list | tuple) and type(value) in (list, tuple):
        for number, part in enumerate(value):
            yield from _unplain(part, f"{where}[{number}]")
    elif type(value) not in _PLAIN:
        yield f"{where} is a {type(value).__name__}: give plain values, from which the factory builds what it needs"


def argument_errors(factory: str, arguments: Mapping[str, Any], given: frozenset[str] = frozenset()) -> dict[str, str]:
    """Check the arguments of a factory by its signature; imports its module. Returns a sentence by argument.

    An annotation decides a value's type and bounds, as in ``epochs: Annotated[int, msgspec.Meta(ge=1)]``; values stay
    plain. The empty name stands for the factory.

    Args:
        factory: ``package.module:function``.
        given: Names of parameters that the caller adds.
    """
    try:
        built: Any = pkgutil.resolve_name(factory)
        signature = inspect.signature(built, eval_str=True)
    except Exception as error:  # of a module that is not ours
        return {"": f"{factory} cannot be imported: {type(error).__name__}: {error}"}
    takes = {name: one for name, one in signature.parameters.items() if name not in given}
    takes_any = any(one.kind is one.VAR_KEYWORD for one in takes.values())
    named = {name: one for name, one in takes.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    problems: dict[str, str] = {}
    for name, value in arguments.items():
        if name not in named:
            if not takes_any or name in given:
                problems[name] = unknown_names([name], sorted(named))[0]
        elif named[name].annotation is not inspect.Parameter.empty:
            try:
                msgspec.convert(value, named[name].annotation)
            except (msgspec.ValidationError, ValueError) as error:
                problems[name] = f"{name} = {value!r:.80}: {error}"
            except TypeError:  # an annotation that msgspec does not know: the factory decides
                pass
    missing = [name for name, one in named.items() if one.default is one.empty and name not in arguments]
    return problems | {name: f"{name}: is missing; give it" for name in missing}
