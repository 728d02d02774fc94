"""A program that uploads what a job, as JSON, names, and can be killed."""

from __future__ import annotations

import json
import sys

from events.checkpoint.objects import Limits
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CheckpointStore
from events.origin import Origin
from sinks.checkpoints.uploader import CheckpointUploader

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
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
