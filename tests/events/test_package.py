"""What `events` is made of: its public names, its event types, and what it may import."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import events
from events.errors import StagecastError
from events.messages import EVENT_TYPES, Event, UnknownEvent

FOLDER = Path(events.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if path.parent != FOLDER / "golden"
)
LATE = {"bus.worker": {"trio"}, "checkpoint.packing_numpy": {"numpy"}, "checkpoint.objects": {"obstore"}}
"""What a module imports in functions only: who has none of it needs none of it."""
ALLOWED = {"events", "msgspec", "anyio", "structlog", "xxhash", *sys.stdlib_module_names}
PUBLIC = {
    "ArgumentsError",
    "BusClosed",
    "CheckpointDamaged",
    "CheckpointError",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointTooNew",
    "CheckpointsFailing",
    "CursorError",
    "FenceBroken",
    "Payload",
    "Pump",
    "Readback",
    "Ring",
    "RunCancelled",
    "RunFolderError",
    "RunFolderHeld",
    "RunFolderMismatch",
    "SinkHostFailed",
    "SinkMisconfigured",
    "StagecastError",
    "TrainingThreadStuck",
    "UnstorableState",
    "UploadError",
    "WireError",
    "frame",
    "runs",
}


def run_python(script: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_importing_events_loads_nothing_heavy(tmp_path: Path) -> None:
    """Nor does any of its modules: a sink host, or a reader of journals, must not pay for torch."""
    script = (
        "import importlib, sys\n"
        f"for name in {MODULES!r}:\n"
        "    importlib.import_module(f'events.{name}' if name != '__init__' else 'events')\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    loaded = set(ast.literal_eval(run_python(script, tmp_path)))
    assert {"events", "anyio", "msgspec", "structlog"} <= loaded
    # Not rich: structlog imports it where it is installed.
    assert not loaded & {"torch", "numpy", "yaml", "trio", "trainer", "sinks", "hypothesis"}


def imported(tree: ast.AST) -> set[str]:
    """The packages that a piece of code imports, by their first name."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("events" if node.level else (node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_package_may(module: str) -> None:
    """Within functions too, with few exceptions: trio's own tasks, NumPy's own values, stores that few have."""
    tree = ast.parse((FOLDER / f"{module.replace('.', '/')}.py").read_text())
    assert imported(tree) - ALLOWED <= LATE.get(module, set())


def test_the_public_names_are_these() -> None:
    """Names are added on purpose; each is what it is called."""
    names = {
        name
        for name, value in vars(events).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert names == PUBLIC
    assert set(getattr(events, "__all__", PUBLIC)) == PUBLIC
    for name in PUBLIC:
        assert getattr(events, name).__name__ == name
    assert events.__stagecast__ is True


def test_every_error_is_a_stagecast_error() -> None:
    """One `except` catches all that the library raises on its own account, and each is public."""
    errors = importlib.import_module("events.errors")
    found = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert all(issubclass(error, StagecastError) for error in found)
    assert {error.__name__ for error in found} <= PUBLIC


def subclasses(kind: type[Event]) -> set[type[Event]]:
    direct = {sub for sub in kind.__subclasses__() if sub.__module__.startswith("events.")}
    return direct.union(*(subclasses(sub) for sub in direct))


def test_every_event_type_is_listed() -> None:
    """One that is missing from `EVENT_TYPES` would be routed to nobody."""
    for module in MODULES:
        if module != "__init__":
            importlib.import_module(f"events.{module}")
    assert subclasses(Event) - {UnknownEvent} == set(EVENT_TYPES)
    assert len(EVENT_TYPES) == len(set(EVENT_TYPES))


HOT = {"TrainStepEnded", "BackwardEnded"}
"""Events of each step or micro-batch, which are built by position."""


def test_cold_events_are_built_by_keyword() -> None:
    """So that a reader sees which value is which. A header, which is one tuple, may come first."""
    kinds = {kind.__name__ for kind in EVENT_TYPES} - HOT
    paths = [path for package in ("events", "trainer", "sinks") for path in (FOLDER.parent / package).rglob("*.py")]
    found = [
        f"{path.relative_to(FOLDER.parent)}:{node.lineno} {node.func.id}"
        for path in sorted(paths)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds
        if not all(isinstance(argument, ast.Starred) for argument in node.args)
    ]
    assert found == []


@pytest.mark.parametrize("kind", [*EVENT_TYPES, UnknownEvent], ids=lambda kind: kind.__name__)
def test_every_event_is_a_frozen_tagged_fact_with_the_header_first(kind: type[Event]) -> None:
    """So that any of them can be placed without knowing its type."""
    config = kind.__struct_config__
    assert (config.frozen, config.tag, config.tag_field, config.gc) == (True, kind.__name__, "type", False)
    assert kind.__struct_fields__[: len(Event.__struct_fields__)] == Event.__struct_fields__
    assert kind.journalled or kind.droppable  # what must not be lost is kept
