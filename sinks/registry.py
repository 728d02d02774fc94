"""Find sinks by name, in this package and in other installed packages.

A package provides a sink through an entry point of the group ``stagecast.sinks``. It names an `events.sink.Sink` that
is a `msgspec.Struct`, so it can be built from plain values::

    [project.entry-points."stagecast.sinks"]
    pigeon = "pigeon_post.stagecast:Pigeon"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from events.errors import SinkMisconfigured
from events.sink import Sink
from events.strict import unknown_names

GROUP = "stagecast.sinks"


def sink_names() -> list[str]:
    """The names of all installed sinks, sorted."""
    return sorted(_found())


def sink_type(name: str) -> type[Sink]:
    """The class of a sink.

    Raises:
        SinkMisconfigured: There is no sink of that name, or its entry point is invalid or cannot be imported.
    """
    entry = _found().get(name)
    if entry is None:
        raise SinkMisconfigured(f"there is no sink {name!r}; installed are {', '.join(sink_names())}")
    try:
        kind = entry.load()
    except (Exception, SystemExit) as error:  # of another package, which the message names
        raise SinkMisconfigured(f"the sink {name!r} ({entry.value}) cannot be imported: {error!r}") from error
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct) and callable(getattr(kind, "open", None))):
        raise SinkMisconfigured(f"the sink {name!r} ({entry.value}) is not a msgspec.Struct with a method open(run)")
    return kind  # type: ignore[return-value]  # a Struct with `open` is one


def build_sink(name: str, options: Mapping[str, object]) -> Sink:
    """Build a sink from plain values of a file or a command line.

    Raises:
        SinkMisconfigured: There is no such sink, or an option is unknown or of the wrong type: names its path.
    """
    kind: Any = sink_type(name)
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    unknown = [option for option in options if option not in fields]
    problems = unknown_names(unknown, sorted(fields), getattr(kind, "argument_aliases", {}))
    for option, value in options.items():
        try:
            if option in fields:
                msgspec.convert(value, fields[option].type, strict=False)
        except msgspec.ValidationError as error:
            problems.append(f"{option} = {value!r:.80}: {error}")
    if problems:
        raise SinkMisconfigured(f"the sink {name!r}: {'; '.join(problems)}")
    try:
        sink: Sink = msgspec.convert(dict(options), kind, strict=False)
    except msgspec.ValidationError as error:
        raise SinkMisconfigured(f"the sink {name!r}: {error}") from error
    return sink


def _found() -> dict[str, EntryPoint]:
    found = entry_points(group=GROUP)
    # Ours last, so that other packages cannot replace them.
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.module.partition(".")[0] == "sinks")}
