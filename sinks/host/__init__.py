"""The sink host: a process in which sinks run."""
