"""Sinks that send to services of others: trackers and monitoring."""
