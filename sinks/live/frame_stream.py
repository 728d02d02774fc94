"""Sends a run's snapshot and frames to one client, as WebSocket messages or as Server-Sent Events."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from sinks.live.client import Client, Hello
from sinks.live.frames import Message as Sent
from sinks.live.hub import Hub


async def send_frames(hub: Hub, hello: Hello, client: Client, shape: Callable[[Sent | int], str | bytes]) -> None:
    """Send a snapshot where one is needed, and each frame when it is created, until the run is over.

    Args:
        shape: Encodes a snapshot or a frame for the client; or, if frames were missed, their number.
    """
    frames = hub.frames
    await hub.refresh()
    async with anyio.create_task_group() as driving:
        await driving.start(hub.drive)
        number = hub.resume(hello.attempt, hello.since) if hello.since else None
        generation = frames.generation
        while True:
            if number is None or generation != frames.generation or client.takes_snapshot():
                snapshot = await hub.snapshot()
                number, generation = snapshot.number + 1, snapshot.generation
                await client.send(shape(snapshot))
            while frames.newest < number and generation == frames.generation and not frames.is_over:
                await frames.news.wait()
            if generation != frames.generation:
                continue
            if number > frames.newest:
                break
            frame = frames.get(number)
            if frame is None:
                await client.send(shape(frames.oldest - number))
                number = None
                continue
            await client.send(shape(frame))
            number += 1
        driving.cancel_scope.cancel()


def as_text(message: Sent | int) -> str:
    """Return a message by WebSocket."""
    return message.text if isinstance(message, Sent) else f'{{"type":"gap","lost":{message}}}'


def as_event(message: Sent | int) -> bytes:
    """Return a server-sent event; one for a gap has no id, from which a client would resume behind it."""
    return message.event if isinstance(message, Sent) else b'event: gap\ndata: {"type":"gap","lost":%d}\n\n' % message
