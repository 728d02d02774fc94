"""The journal: every event of a run on disk, as JSON lines in segments; writing, reading and following it."""
