from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sinks


def test_somebody_elses_events_is_refused_by_name(run_python: Any, tmp_path: Path) -> None:
    """The name is generic: a user's own ``events.py`` beside the script would shadow ours."""
    stranger = tmp_path / "events.py"
    stranger.write_text("")
    result = run_python("import sinks")
    assert result.returncode == 1
    assert "ImportError: stagecast's sinks need the package 'events'" in result.stderr
    assert str(stranger) in result.stderr
    assert "Rename that file" in result.stderr


@pytest.mark.parametrize("name", ["sinks.console", "sinks.memory"])
def test_somebody_elses_events_is_refused_by_submodules_too(run_python: Any, tmp_path: Path, name: str) -> None:
    """Whoever imports a sink directly gets the same answer, not a missing submodule."""
    (tmp_path / "events.py").write_text("")
    assert "ImportError: stagecast's sinks need" in run_python(f"import {name}").stderr


def test_importing_sinks_loads_no_client(run_python: Any) -> None:
    """Rich is imported when a console is opened, torch never."""
    script = (
        "import sys, sinks\n"
        "sinks.Console(), sinks.Memory()\n"
        "print(sorted({'rich', 'torch', 'trainer', 'numpy'} & set(sys.modules)))"
    )
    result = run_python(script)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_public_surface_is_what_it_says() -> None:
    """Names are added on purpose."""
    names = {
        "CSV",
        "Console",
        "JSONL",
        "Live",
        "MLflow",
        "Memory",
        "OpenTelemetry",
        "Prometheus",
        "TensorBoard",
        "WandB",
    }
    assert set(sinks.__all__) == names
    assert names <= set(dir(sinks))
    for name in names:
        assert getattr(sinks, name).__module__ == ("sinks.live.sink" if name == "Live" else f"sinks.{name.lower()}")
    with pytest.raises(AttributeError, match="Console, Live, MLflow, Memory"):
        sinks.Tensorboard  # noqa: B018
