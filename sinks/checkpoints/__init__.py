"""The sinks that write and upload checkpoints."""
