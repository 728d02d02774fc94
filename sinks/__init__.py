"""Observers of a run: plain descriptions that are opened when the run starts.

A sink's third-party client is imported when the sink is opened, so ``import sinks`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import events

if TYPE_CHECKING:
    from sinks.console import Console as Console
    from sinks.memory import Memory as Memory

__all__ = ["Console", "Memory"]


def _check_events() -> None:
    """Refuse a stranger's ``events``: the name is generic, and one earlier on the path would shadow ours."""
    if getattr(events, "__stagecast__", False) is True:
        return
    file = getattr(events, "__file__", None)
    where = file or ", ".join(getattr(events, "__path__", ())) or repr(events)
    raise ImportError(
        "stagecast's sinks need the package 'events' that is installed with them, but 'import events' found "
        f"{where}, which shadows it. Rename that file or folder, or take the folder it lies in off sys.path "
        "(a script's own folder comes first there).",
        name="events",
        path=file,
    )


_check_events()


# Lazy, because a submodule imported at the top would meet a shadowing `events` before the check above.
def __getattr__(name: str) -> Any:
    if name == "Console":
        from sinks.console import Console

        return Console
    if name == "Memory":
        from sinks.memory import Memory

        return Memory
    raise AttributeError(f"module 'sinks' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
