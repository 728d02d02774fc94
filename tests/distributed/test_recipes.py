"""The recipes for clusters, with the script of the guide: they train, and end in a checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.journal_waits import JournalWaiter
from support.scripts import ROOT
from support.training import read_journal
from torch.distributed.run import get_args_parser

from events.checkpoint.store import CheckpointStore
from events.messages import Event, RunEnded, TrainStepEnded

EXAMPLES = ROOT / "trainer" / "examples"
GUIDE = (ROOT / "trainer" / "distributed" / "README.md").read_text(encoding="utf-8")
SLURM = (EXAMPLES / "slurm.sh").read_text(encoding="utf-8")
SERVICE, JOB = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]

JOB_ID = str(os.getpid())

# Stand for Slurm's own, with two nodes that are processes of this machine.
COMMANDS = {
    "torchrun": f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "127.0.0.1\\nother\\n"; else echo "$@" >> requeued; fi',
    "scancel": 'echo "$@" >> cancelled; kill -TERM $(cat nodes)',
    "srun": """
while case "$1" in --*) true;; *) false;; esac; do shift; done
for node in $(seq "$SLURM_NNODES"); do
  "$@" 2>&1 &
  nodes="$nodes $!"
done
echo "$nodes" > nodes
code=0
for node in $nodes; do wait "$node" || code=$?; done
exit "$code"
""",
}


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run the Slurm script as a job of two nodes with one rank each, in its own session."""
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (script,) = re.findall(r"^```python\n# (train\.py\n.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(f"# {script}")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = clean | {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }
    jobs: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        with (tmp_path / "log").open("a") as log:
            command = ["bash", str(EXAMPLES / "slurm.sh"), "train.py", *words]
            jobs.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
                )
            )
        return jobs[-1]

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    for process in processes_of("RANK").values():  # torchrun has put them into sessions of their own
        process.kill()


def processes_of(variable: str) -> dict[str, psutil.Process]:
    """Return the processes of the job that have a variable in their environment, by its value."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("SLURM_JOB_ID") == JOB_ID and variable in environment:
                found[environment[variable]] = process
    return found


@pytest.mark.timeout(240)
def test_the_slurm_job_survives_a_killed_rank_and_the_end_of_its_time(
    submit: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    """torchrun restarts the ranks of both nodes; before the end of the time all stop with a checkpoint."""
    folder = tmp_path / "runs" / "digits"

    def events() -> list[Event]:
        return read_journal(folder) if (folder / "journal").is_dir() else []

    def wait_for_step(attempt: int, step: int) -> None:
        try:
            waiting.wait_for(
                TrainStepEnded, lambda event: (event.attempt, event.global_step) >= (attempt, step), timeout_s=90
            )
        except AssertionError:
            raise AssertionError((tmp_path / "log").read_text()[-5000:]) from None

    job = submit("epochs=100000")
    waiting = JournalWaiter(folder, lambda: job.poll() is not None)
    wait_for_step(1, 150)
    processes_of("RANK")["1"].kill()
    wait_for_step(2, 0)
    job.send_signal(signal.SIGUSR1)  # as Slurm sends it to the script alone
    assert job.wait(90) != 0, (tmp_path / "log").read_text()[-5000:]
    assert (tmp_path / "cancelled").read_text().split() == ["--signal=TERM", JOB_ID]
    assert (tmp_path / "requeued").read_text().split() == ["requeue", JOB_ID]
    *_, ended = [event for event in events() if isinstance(event, RunEnded)]
    assert (ended.status, ended.reason, ended.attempt) == ("stopped", "SIGTERM", 2)
    newest = max(CheckpointStore(folder / "checkpoints").names())
    assert str(newest) == f"step-{ended.global_step}.a2"

    seqs = [event.seq for event in events()]
    assert seqs == sorted(set(seqs))  # one history
    first = next(event for event in events() if isinstance(event, TrainStepEnded) and event.attempt == 2)
    assert first.global_step % 100 == 1  # the one after a checkpoint


@pytest.mark.parametrize("code", [0, 1])
def test_a_slurm_job_that_ends_by_itself_is_not_queued_again(
    submit: Callable[..., subprocess.Popen[str]], tmp_path: Path, code: int
) -> None:
    (tmp_path / "bin" / "torchrun").write_text(f"#!/bin/sh\necho $@\nexit {code}\n")
    assert submit("epochs=1").wait(30) == code
    assert not (tmp_path / "requeued").exists()
    started = (tmp_path / "log").read_text().splitlines()
    assert len(started) == 2
    options = get_args_parser().parse_args(started[0].split())
    assert (options.nnodes, options.nproc_per_node, options.rdzv_id) == ("2", "1", JOB_ID)
    assert options.rdzv_endpoint == f"127.0.0.1:{20000 + int(JOB_ID) % 10000}"
    assert [options.training_script, *options.training_script_args] == ["train.py", "epochs=1"]


def test_the_kubernetes_job_starts_what_the_slurm_job_starts() -> None:
    """The options of torchrun, the names by which the pods find each other, and the grace periods."""
    options = get_args_parser().parse_args(CONTAINER["command"][1:])
    assert CONTAINER["command"][0] == "torchrun"  # gets SIGTERM itself
    count = JOB["spec"]["completions"]
    assert JOB["spec"]["parallelism"] == count == int(options.nnodes)
    name, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert options.rdzv_endpoint == f"{name}-0.{service}:29400"
    assert (POD["subdomain"], JOB["spec"]["completionMode"]) == (service, "Indexed")
    assert SERVICE["spec"]["selector"] == {"job-name": name}
    assert SERVICE["spec"]["clusterIP"] == "None"
    resources = CONTAINER["resources"]
    assert (
        int(options.nproc_per_node) == resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"]
    )
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}
    words = shlex.split(SLURM.partition(" torchrun \\\n")[2].partition('"$@"')[0].replace("\\\n", ""))
    named = {word.partition("=")[0] for word in CONTAINER["command"] if word.startswith("--")}
    assert {word.partition("=")[0] for word in words} == named
    environment = dict(re.findall(r"^export (TORCH\w+)=(\d+)$", SLURM, flags=re.MULTILINE))
    assert {variable["name"]: variable["value"] for variable in CONTAINER["env"]} == environment
    grace_s = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    (signal_s,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", SLURM, flags=re.MULTILINE)
    assert POD["terminationGracePeriodSeconds"] > grace_s
    assert int(signal_s) > grace_s


def test_the_commands_of_the_guide_are_those_of_torchrun() -> None:
    """Each is parsed by torchrun's own parser."""
    commands = re.findall(r"^torchrun (.*)$", GUIDE.replace("\\\n", ""), flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        options = get_args_parser().parse_args(shlex.split(command))
        assert options.training_script == "train.py"
