"""A process that has imported everything, and forks uploaders that can be killed.

Each line of its input is a job, as JSON. It answers with the child's id, and with how the child ended.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])

import obstore.store  # noqa: F401, E402  # so that a child need not

from events.checkpoint.objects import Limits  # noqa: E402
from events.checkpoint.settings import Checkpoints  # noqa: E402
from events.checkpoint.store import CheckpointStore  # noqa: E402
from events.origin import Origin  # noqa: E402
from sinks.checkpoints.uploader import CheckpointUploader  # noqa: E402


def work(job: dict[str, Any]) -> None:
    os.environ.update(job["environment"])
    uploader = CheckpointUploader(
        CheckpointStore(job["folder"]),
        job["url"],
        Checkpoints(**job["settings"]),
        lambda event: None,
        Origin("run", job["attempt"]).header,
        lambda: None,
        Limits(**job["limits"]),
    )
    uploader.open()


def main() -> None:
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                work(json.loads(line))
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
