"""Sinks that append to files in the run folder."""
