"""Checkpoints on disk and in remote stores: their format, their commit, which is the newest. Never imports torch."""
