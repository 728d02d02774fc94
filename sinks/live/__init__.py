"""Watching runs over the network: an ASGI application, its page, and a sink and a command that serve it."""
