"""The README is true: its snippets run, and its commands are those that CI uses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.timeout(120)
def test_a_snippet_runs(number: int, tmp_path: Path) -> None:
    """Each snippet runs by itself in an empty folder, after those before it."""
    script = tmp_path / "snippet.py"
    script.write_text("\n\n".join(SNIPPETS[: number + 1]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


def test_both_commands_name_the_torch_version_in_the_same_call() -> None:
    """Otherwise pip fetches a build with CUDA on a machine without a GPU."""
    installing = [command for command in COMMANDS if "pip install" in command]
    assert len(installing) == 2
    for command in installing:
        assert re.search(r"pip install torch==2\.13\.0 -e ", command)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """It is marked in the README, and .ci/run takes it from there."""
    assert re.search(r"<!-- tests -->\n```bash\n.*-m pytest\n```", README)
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
