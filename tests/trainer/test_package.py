"""The packages: their public names, their imports, and the files that may not shadow them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scripts import ROOT, Start

import trainer

pytestmark = pytest.mark.cold_start  # imports are what is tested


OURS = [
    "events",
    "events.journal.reader",
    "sinks",
    "sinks.files.csv",
    "trainer",
    "trainer.cli.main",
    "trainer.callbacks",
]


@pytest.mark.parametrize("form", ["file", "package"])
@pytest.mark.parametrize("name", ["events", "sinks", "trainer"])
def test_a_file_or_package_that_shadows_ours_is_refused_by_name(
    script: Start, tmp_path: Path, name: str, form: str
) -> None:
    """The names are generic: whichever of ours is imported first names the shadowing file beside the script."""
    stranger = tmp_path / (f"{name}.py" if form == "file" else f"{name}/__init__.py")
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("")
    code, _, err = script(
        f"for name in {[one for one in OURS if not f'{one}.'.startswith(f'{name}.')]}:\n"
        "    try:\n"
        "        __import__(name)\n"
        "    except ImportError as error:\n"
        f"        assert {f'{name!r}, but {stranger} shadows it: rename that file or folder'!r} in str(error), error\n"
        f"        assert (error.name, error.path) == {(name, str(stranger))!r}\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
    ).end()
    assert (code, err) == (0, "")


def test_a_shadowing_package_that_is_imported_first_is_refused_too(script: Start, tmp_path: Path) -> None:
    """Also one without a file; a folder without ``__init__.py``, and a copy of ours elsewhere, shadow nothing."""
    (tmp_path / "trainer").mkdir()
    copy = tmp_path / "copy" / "sinks"
    copy.mkdir(parents=True)
    (copy / "__init__.py").write_text((ROOT / "sinks" / "__init__.py").read_text())
    program = script(
        "import sys, types\n"
        "sys.path.insert(0, 'copy')\n"
        "sys.modules['trainer'] = types.ModuleType('trainer')\n"
        "try:\n"
        "    import events\n"
        "except ImportError as error:\n"
        "    assert \"'trainer', but <module 'trainer'> shadows it\" in str(error), error\n"
        "    del sys.modules['trainer']\n"
        "import events, sinks, trainer\n"
        "print(sinks.__file__.endswith('copy/sinks/__init__.py'), trainer.__file__)\n"
    )
    assert program.end() == (0, f"True {ROOT / 'trainer' / '__init__.py'}\n", "")


@pytest.mark.parametrize("name", ["events", "sinks"])
def test_commands_name_the_file_that_shadows_a_package(tmp_path: Path, name: str) -> None:
    """``python -m`` searches the working directory first; `stagecast train` searches it later."""
    stranger = tmp_path / f"{name}.py"
    stranger.write_text("")
    (tmp_path / "run.yaml").write_text("module: jobs:make\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*words: str) -> str:
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True).stderr

    says = f"stagecast needs its own package '{name}', but {stranger} shadows it: rename that file or folder"
    assert f"ImportError: {says}" in run("-m", "trainer.cli.main", "--help")
    if name == "sinks":  # `events` is imported by then
        text = run("-P", "-c", "import sys; from trainer.cli.main import main; sys.exit(main(['train', 'run.yaml']))")
        assert text.startswith("stagecast train: error: run.yaml: ")
        assert says in text
        assert "Traceback" not in text


def test_importing_the_trainer_loads_no_observers_and_no_extras(script: Start) -> None:
    """Sinks and the needs of the examples are imported when they are used; rich can be absent."""
    program = script(
        "import sys\n"
        "sys.modules['rich'] = None\n"  # makes its import fail: structlog would load it where it is installed
        "import trainer\n"
        "assert trainer.Trainer\n"
        "print(sorted({'sinks', 'sklearn', 'trio', 'trainer.examples', 'trainer.cli.main'} & set(sys.modules)))"
    )
    assert program.end() == (0, "[]\n", "")


def test_events_and_the_help_of_commands_need_no_torch(script: Start) -> None:
    """Host data and its transport work where no torch is installed; help appears immediately."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "events").rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    code, out, err = script(
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "print(sorted({'torch', 'trainer', 'sinks', 'numpy'} & set(sys.modules)))\n"
        "from trainer.cli.main import main\n"
        "try:\n"
        "    main(['demo', '--help'])\n"
        "except SystemExit as ended:\n"
        "    print(ended.code, 'torch' in sys.modules)\n"
    ).end()
    lines = out.splitlines()
    assert (code, lines[0], lines[-1], err) == (0, "[]", "0 False", "")


def test_the_public_names_are_chosen_and_imported_on_first_use() -> None:
    """A wrong name raises an error with the right ones."""
    assert trainer.__all__ == [
        "Audio",
        "CallbackInterface",
        "Checkpoints",
        "Delivery",
        "Histogram",
        "Image",
        "InitFrom",
        "ModuleInterface",
        "RunInterrupted",
        "RunTerminated",
        "Schedule",
        "Stage",
        "Table",
        "Trainer",
        "TrainerArguments",
        "connect",
        "fenced",
        "find_batch_size",
        "find_learning_rate",
        "inline",
        "launch",
        "observer",
        "to_device",
    ]
    for name in trainer.__all__:
        assert name in dir(trainer)
        assert getattr(trainer, name).__name__ == name
    with pytest.raises(AttributeError, match=r"has no attribute 'Triner'; it has .*Trainer"):
        trainer.Triner  # noqa: B018


# ---------------------------------------------------------------------------------------------- who imports whom


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The top-level packages a file imports, and whether each import runs when the file is imported itself."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            yield (node.module or "").partition(".")[0], at_import
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            name = node.args[0]
            yield str(name.value if isinstance(name, ast.Constant) else "?").partition(".")[0], at_import
        inner = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            inner = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text()), True)


FILES = sorted(path for package in ("events", "trainer", "sinks") for path in (ROOT / package).rglob("*.py"))


def wrong_imports(package: str, names: str, *, at_import: bool) -> dict[str, list[str]]:
    """Return the files of a package that import one of these names, or do so when they are imported themselves."""
    found = {}
    for path in FILES:
        if path.is_relative_to(ROOT / package):
            wrong = {name for name, now in imports(path) if now or not at_import} & set(names.split())
            if wrong:
                found[str(path.relative_to(ROOT))] = sorted(wrong)
    return found


def test_the_imports_of_files_are_found() -> None:
    """The tests below rely on it."""
    assert len(FILES) > 50
    assert ("events", True) in set(imports(ROOT / "trainer/__init__.py"))
    assert ("sinks", False) in set(imports(ROOT / "trainer/run/defaults.py"))


@pytest.mark.parametrize(
    ("package", "never"),
    [("events", "trainer sinks torch rich yaml"), ("sinks", "trainer torch yaml"), ("trainer", "rich")],
)
def test_imports_point_in_one_direction(package: str, never: str) -> None:
    """Also lazy ones."""
    assert wrong_imports(package, never, at_import=False) == {}


ADAPTERS = {
    *(
        f"sinks/live/{name}.py"
        for name in ("access", "responses", "app", "client", "protocols", "pushes", "server", "table")
    ),
    "sinks/nats/client.py",
    "sinks/nats/mirror.py",
    "sinks/nats/publisher.py",
    "sinks/trackers/otlp_export.py",
    "trainer/cli/runs.py",
    "trainer/remote/address.py",
    "trainer/remote/http.py",
    "trainer/remote/nats.py",
    "trainer/examples/service.py",
}
"""Modules around a client or a command, which are imported when it is needed."""


@pytest.mark.parametrize(
    ("package", "late"),
    [
        ("trainer", "sinks sklearn numpy trio httpx psutil PIL matplotlib"),
        (
            "sinks",
            "rich numpy tensorboardX google_crc32c wandb mlflow nats prometheus_client opentelemetry requests "
            "starlette uvicorn",
        ),
        ("events", "trio numpy obstore"),
    ],
)
def test_some_imports_wait_until_they_are_needed(package: str, late: str) -> None:
    """Sinks are built by name; clients and extras are imported by the code that uses them."""
    assert wrong_imports(package, late, at_import=True).keys() <= ADAPTERS


def test_no_test_folder_is_a_package() -> None:
    """``tests/events/__init__.py`` would shadow our ``events``."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
