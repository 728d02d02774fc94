"""Checkpoints on the side of the trainer: when one is taken, how its state is copied, and resuming."""
