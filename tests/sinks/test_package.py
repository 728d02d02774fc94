from __future__ import annotations

from typing import Any

import pytest

import sinks


def test_importing_sinks_loads_no_client(run_python: Any) -> None:
    """Rich is imported when a console is opened, starlette when a page is served, torch never."""
    script = (
        "import sys, sinks\n"
        "sinks.Console(), sinks.Memory()\n"
        "print(sorted({'rich', 'torch', 'trainer', 'numpy'} & set(sys.modules)))\n"
        "import sinks.live.report\n"
        "sinks.Live(), sinks.Prometheus(), sinks.Push('https://host')\n"
        "print(sorted({'torch', 'trainer', 'starlette', 'uvicorn', 'httpx'} & set(sys.modules)))\n"
    )
    result = run_python(script)
    assert result.stdout.split() == ["[]", "[]"], result.stderr


def test_the_public_surface_is_what_it_says() -> None:
    """Names are added on purpose."""
    names = {
        "Alert",
        "CSV",
        "Console",
        "JSONL",
        "Live",
        "MLflow",
        "Memory",
        "NATS",
        "OpenTelemetry",
        "Prometheus",
        "Push",
        "TensorBoard",
        "WandB",
    }
    assert set(sinks.__all__) == names
    assert names <= set(dir(sinks))
    for name in names:
        assert getattr(sinks, name).__module__.startswith("sinks.")
    with pytest.raises(AttributeError, match="NATS, Alert, Console, Live, MLflow, Memory"):
        sinks.Tensorboard  # noqa: B018
