"""The record of a run's origin: hyperparameters, command line, git commit, host and versions."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from events.bounds import INT_MAX, INT_MIN, check_plain
from events.masking import masked_values, own_command_line
from events.wire import without_surrogates
from trainer.run.checks import shown
from trainer.run.git import GitLookup
from trainer.run.versions import versions

_MAX_FACTORY_BYTES = 10_000
"""Maximum bytes, as JSON, per recorded argument of a factory: some are given data."""


class RunRecord:
    """What `RunStarted` records about the origin of an attempt. The lookup of the commit begins here.

    Args:
        kind: The class of the module.
        config: The hyperparameters, as plain values.
        command_line: That of the process which launched this one; None for that of this process.
    """

    def __init__(self, kind: type, config: dict[str, Any], command_line: str | None) -> None:
        self.config = config
        self._command_line = command_line if command_line is not None else own_command_line()
        self._git = GitLookup(kind)

    def fields(self) -> dict[str, Any]:
        """Return the fields of `RunStarted`; waits for git, at most `trainer.run.git.LIMIT_S` and a little."""
        git = self._git.result()
        return {
            "config": self.config,
            "command_line": self._command_line,
            "git_commit": git.commit,
            "git_dirty": git.is_dirty,
            "versions": versions(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }


def plain_config(config: Any, problems: list[str]) -> dict[str, Any]:
    """Return the user's hyperparameters as JSON values; all others become text.

    Args:
        config: A mapping, a dataclass, an attrs class, a Struct, or any object with attributes, such as the namespace
            of argparse or a pydantic model. They may nest. None for no hyperparameters.
    """
    if config is None:
        return {}
    try:
        plain = _plain(config)
    except (TypeError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        problems.append(f"config={shown(config)} cannot be recorded ({error}); give a mapping of plain values")
        return {}
    if isinstance(plain, dict):
        return plain
    problems.append(f"config={shown(config)} has no names; give a mapping, a dataclass or a Struct")
    return {}


def factory_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a factory as JSON values, never with an error; a large one is described by its size."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        try:
            plain: Any = _plain({name: value})
            size = len(msgspec.json.encode(plain))
            found |= plain if size <= _MAX_FACTORY_BYTES else {name: f"{type(value).__name__} of {size:,} bytes"}
        except (TypeError, ValueError, RecursionError, msgspec.MsgspecError):
            found[name] = f"{type(value).__name__} that cannot be recorded"
    return found


def _plain(value: Any) -> Any:
    """Return JSON values without secrets. Raises what `msgspec.to_builtins` raises, and ValueError."""
    plain = msgspec.to_builtins(value, str_keys=True, enc_hook=_plain_value)
    plain = without_surrogates(masked_values(_within_64_bits(plain)))
    check_plain(plain, "config")
    return plain


def _within_64_bits(value: Any) -> Any:
    """Replace larger integers by their text, which the journal, browsers and msgpack can hold."""
    if isinstance(value, dict):
        return {key: _within_64_bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_within_64_bits(item) for item in value]
    if isinstance(value, int) and not INT_MIN <= value <= INT_MAX:
        return str(value) if value.bit_length() < 10_000 else f"an integer of {value.bit_length():,} bits"
    return value


def _plain_value(value: Any) -> Any:
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):  # pydantic
        return dump()
    if isinstance(value, Mapping):  # that of another library, such as OmegaConf
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, range):
        return list(value)
    if callable(item := getattr(value, "item", None)) and getattr(value, "shape", None) == ():  # a number of NumPy's
        return item()
    if isinstance(value, os.PathLike | type) or callable(value) or not hasattr(value, "__dict__"):
        return str(value)
    if getattr(value, "shape", None) is not None:  # an array or a tensor
        return str(value)
    public = {name: item for name, item in vars(value).items() if not name.startswith("_")}
    return public if public or not vars(value) else str(value)
