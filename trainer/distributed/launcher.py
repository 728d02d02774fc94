"""What ``torchrun`` says about the job that it has started."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import NamedTuple

from events.text import name_problem

_runs = itertools.count(1)


class Job(NamedTuple):
    """A run of a job that torchrun restarts."""

    run_id: str | None = None
    """The same in each restart; None: the launcher has given no id."""
    restarted: bool = False
    """Whether an earlier life of the job's processes has ended."""

    @classmethod
    def next(cls, environment: Mapping[str, str] = os.environ) -> Job:
        """Return that of this process's next run; the runs after the first have ids of their own."""
        name, number = environment.get("TORCHELASTIC_RUN_ID", "none"), next(_runs)
        restarted = environment.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if name == "none" or name_problem(name) is not None or "/" in name:
            return cls(None, restarted)
        return cls(name if number == 1 else f"{name}-{number}", restarted)


NO_JOB = Job()
"""No launcher."""
