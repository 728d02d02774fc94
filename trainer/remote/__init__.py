"""Runs in other processes and on other machines: `launch` and `connect`."""
