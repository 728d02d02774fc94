"""Alerts: a sink that tells a person what a run needs them for."""
