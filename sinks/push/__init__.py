"""Sends a run to a central page, by outgoing HTTP requests: see `sinks.push.sink`."""
