"""Programs that `support.nursery` forks behave as those that the system starts."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import nursery

COLD = subprocess.Popen
PROGRAMS = {
    "arguments": "import sys; print(sys.argv, __name__, sys.stdin.read())",
    "search path": "import sys; print(sys.path[:3])",
    "environment": "import os; print(sorted(set(os.environ) & {'A', 'HOME'}), os.environ['A'], os.getcwd())",
    "family": "import os; print(os.getppid(), os.getsid(0) == os.getpid(), os.get_inheritable(1))",
    "exit code": "raise SystemExit(3)",
    "exit text": "import sys; print(1); sys.exit('bye')",
    "ctrl-c": "raise KeyboardInterrupt",
    "exception": "import atexit; atexit.register(print, 'late'); 1 / 0",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('end'))).start()",
    "descriptors": "import os; print(sorted(os.listdir('/proc/self/fd'))[:-1])",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)",
    "encoding": "import sys; print(ascii('\u00e4'), '\u00e4', sys.stdout.encoding, file=sys.stderr)",
}


def outcome(popen: Any, folder: Path, words: list[str], **options: Any) -> Any:
    environment = {**os.environ, "A": "1", "PYTHONPATH": "relative:/absolute", "PYTHONIOENCODING": "ascii"}
    pipe = subprocess.PIPE
    command = [sys.executable, *words, "x"]
    with (
        contextlib.chdir(folder),
        popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options) as one,
    ):
        out, err = one.communicate("given", timeout=50)
    return one.returncode, out, err.splitlines()[-1:]


@pytest.mark.parametrize(("name", "form"), list(zip(PROGRAMS, itertools.cycle(["-c", "-m", "script", "-P"]))))
def test_a_forked_program_does_what_a_started_one_does(tmp_path: Path, name: str, form: str) -> None:
    """Exit code, output and the last line of its errors."""
    (tmp_path / "program.py").write_text(PROGRAMS[name])
    words = {"-c": ["-c", PROGRAMS[name]], "-P": ["-P", "-c", PROGRAMS[name]], "-m": ["-m", "program"]}
    options = {"start_new_session": form == "-P"}
    cold, warm = (
        outcome(popen, tmp_path, words.get(form, ["program.py"]), **options) for popen in (COLD, nursery.Popen)
    )
    assert warm == cold


def test_a_forked_program_has_torch_in_memory_and_gets_signals(tmp_path: Path) -> None:
    """Else it would be as slow as one that the system starts, which happens without a word."""
    text = "import sys, time; print('torch' in sys.modules, flush=True); time.sleep(100)"
    with nursery.Popen([sys.executable, "-c", text], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(50) == -signal.SIGTERM
