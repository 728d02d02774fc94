"""What each run of a folder was and came to: one entry per run, as tables, conditions and columns."""
