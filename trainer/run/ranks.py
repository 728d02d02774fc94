"""The session's part among those of other ranks: it agrees with them, and ends with them."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import anyio

from events.protocol import RunResult
from trainer.distributed.agent import Agent
from trainer.distributed.ending import RankEnd, exit_now
from trainer.distributed.failure import peer_failed
from trainer.distributed.summary import RankReports
from trainer.distributed.worker_signals import count_runs
from trainer.errors import PeerFailed
from trainer.loop.attempt import Attempt
from trainer.run.loop_thread import LoopThread

_LOST_GRACE_S = 5.0
"""Seconds in which a loop comes to its next tick, or its collective fails, once another rank has failed."""
_LOOK_S = 0.25


class RankSession:
    """What the session of one of several ranks does besides.

    Attributes:
        lost: The failure of another rank, if the loop hangs in a collective with it.

    Args:
        opened: Closes it.
        run_dir: The run folder, which rank 0 holds.
    """

    drain_s = 3.0
    """Maximum seconds per drain after a failure of a rank: the launcher kills the others after 30 s."""

    def __init__(self, attempt: Attempt, loop: LoopThread, run_dir: str | None, opened: contextlib.ExitStack) -> None:
        self.lost: PeerFailed | None = None
        self._attempt, self._loop, self._run_dir = attempt, loop, run_dir
        world, origin, arguments = attempt.world, attempt.origin, attempt.arguments
        self._reports = reports = RankReports(
            attempt.ledger, attempt.exchange, attempt.readback, attempt.device, world.size
        )
        self._agent = Agent(
            world.prefixed(f"agreement/{origin.run_id}/{origin.attempt}"),
            world.rank,
            world.size,
            now=lambda: (attempt.phase, origin.global_step),
            summary=lambda: reports.newest,
            peer_timeout_s=arguments.peer_timeout_s,
            collective_timeout_s=arguments.collective_timeout_s,
        )
        self._agent.start()
        opened.callback(self._agent.close)
        count_runs(1)
        opened.callback(count_runs, -1)
        attempt.control.join(self._agent)

    @property
    def has_failed(self) -> bool:
        """Whether a rank has failed, so that the launcher will soon kill the others."""
        return self.lost is not None or self._loop.ending.status == "failed"

    async def wait_for_loop(self, wait: Callable[[], Awaitable[None]]) -> None:
        """Wait for the end of the loop; not for long, once another rank has failed."""
        async with anyio.create_task_group() as tasks:

            async def lose() -> None:
                while self._agent.failure is None:  # its thread knows no event loop
                    self._report()
                    await anyio.sleep(_LOOK_S)
                    self._agent.watch_store()
                self._attempt.ring.release()
                await anyio.sleep(_LOST_GRACE_S)
                self.lost = peer_failed(self._agent.failure)
                self._loop.abandon_for(self.lost)
                tasks.cancel_scope.cancel()

            tasks.start_soon(lose)
            await wait()
            tasks.cancel_scope.cancel()

    def _report(self) -> None:
        """Summarise this rank; on rank 0, publish the summaries of all."""
        self._reports.look()
        world, peers = self._attempt.world, self._agent.peers
        if world.leads and peers is not None:
            for event in self._reports.events(peers, self._attempt.origin):
                self._attempt.ring.publish(event)

    def leave_end(self, result: RunResult) -> None:
        """Leave for the next attempt how this rank has ended. Waits for the disk."""
        if self._run_dir is not None:
            world = self._attempt.world
            phase = self._loop.ending.phase if result.status == "failed" else None
            end = RankEnd(result.attempt, world.rank, world.host, result.status, result.reason, phase)
            end.write(self._run_dir)

    def exit_if_lost(self) -> None:
        """End the process if the calling thread of `Trainer.train` hangs in a collective: nothing can free it."""
        if self.lost is not None and not self._loop.has_thread:
            exit_now()
