"""Watching and steering a run over the network, through whatever serves it: `sinks.live`, or NATS.

Events come from the run's journal by cursor (`trainer.remote.follower`): a connection that breaks is made again where
it broke, so that no event is missed or repeated. Commands are posted one after another, by one task.

torch is not imported here: a process that watches need not have it in memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager

import anyio

from events.bus.wakeup import Wakeup
from events.errors import RunCancelled
from events.log import logger
from events.messages import Event
from events.protocol import AnyCommand, EventStream, RunResult
from events.run.run import Run
from events.run.stream import BatchedStream, journalled_types
from events.text import is_encodable, plain_text
from events.wire import encode_command
from trainer.errors import CommandRefused, ConnectedRunFailed, ConnectedRunLost, ConnectError, ConnectionLost
from trainer.remote.address import PageAddress, token_of_environment
from trainer.remote.follower import JournalFollower
from trainer.remote.http import Patience, RunServer, Unreachable
from trainer.remote.result import LOOK_BACK, UNDER_WAY, ResultBuilder, RunSnapshot
from trainer.remote.source import RunSource

_NATS_SCHEMES = ("nats://", "tls://")
_NOT_UNDER_WAY = 409
_LEAVE_S = 2.0
"""Maximum seconds to send the commands of a block that was left by an exception."""


def connect(
    url: str | os.PathLike[str], *, run_id: str | None = None, token: str | None = None, give_up_s: float = 60.0
) -> AbstractAsyncContextManager[Run]:
    """Watch and steer a run over the network, under asyncio or trio::

        async with connect("http://127.0.0.1:8765/#run=line") as run:
            async for event in run.events(since=0, types=[TrainEpochEnded]):
                print(event.epoch, event.loss)
            result = await run.result()

    The run is the same as that of `Trainer.run`, but **leaving the block, in whatever way, only disconnects**: the run
    continues. Await `Run.result` inside of the block to wait for the run.

    A connection that breaks is made again where it broke. Commands are sent in order, in the background, at least once;
    the end of the block waits for that. A command that fails is logged, and raises `CommandRefused` or `ConnectionLost`
    in whichever of `Run.result`, `Run.checkpoint` and a stream waits then or next, or else at the end of the block. A
    command to a run that has just ended is harmless.

    The result is built from the events: it has no ``observers`` and no ``run_dir``, and its ``checkpoint`` is a path on
    the run's machine.

    Through NATS the run is that of a sink `NATS`, and `Run.result` reads all of its events in the stream. A run is lost
    when no event has come and no sink has answered for half a minute.

    The server is not trusted. Its answers are limited in size and time, its texts are escaped in messages, and it
    cannot redirect to another server. A token is sent to the server that it belongs to, and to no other.

    Args:
        url: Of the page, with the run's name unless the server has only one run: ``http://.../#run=ID``. The printed
            link with its token, ``.../#token=...&run=ID``. Or the folder of a run with the sink `Live`. Or that of a
            NATS server, ``nats://HOST/ID`` or ``tls://HOST/ID``, with the options of the sink `NATS`.
        run_id: Replaces the run's name in the address.
        token: The token for this server. None: that of the address, else that of the environment variable
            ``STAGECAST_TOKEN``, which belongs to the server that ``STAGECAST_URL`` names (scheme, host and port), or
            without it to servers on this machine (``localhost``, 127.0.0.0/8, ``::1``); to the server of a run folder
            only if ``STAGECAST_URL`` names it. A warning is logged where a token is sent to another machine without
            https.
        give_up_s: Maximum seconds without an answer of the server; then `ConnectionLost` is raised. Entering the block
            tries only once.

    Raises:
        ConnectError: The address is not valid; or, when the block is entered, nothing answers there, the token is wrong
            or the run does not exist.
        ProtocolViolated: The server sent an answer that no server of runs sends.
        ConnectedRunFailed: From `Run.result`: the run failed; `ConnectedRunLost` if its process died.
        RunCancelled: From `Run.result`: the run was cancelled.
    """
    if run_id is not None and not (isinstance(run_id, str) and is_encodable(run_id)):
        raise ConnectError(f"run_id must be the name of a run, not {run_id!r:.80}")
    if not (isinstance(give_up_s, int | float) and give_up_s >= 0):
        raise ConnectError(f"give_up_s={give_up_s!r}: give a number of seconds, 0 to disable retries")
    if isinstance(url, str) and url.lower().startswith(_NATS_SCHEMES):
        from trainer.remote.nats import NatsServer, address_of  # needs nats

        return _ConnectContext(functools.partial(NatsServer, address_of(url, run_id, token), give_up_s))
    page = PageAddress.of(url)
    token, withheld = _token_for(page, token)
    return _ConnectContext(functools.partial(RunServer, page.url, run_id or page.run_id, token, give_up_s, withheld))


def _token_for(page: PageAddress, token: str | None) -> tuple[str | None, str]:
    """Return the token for a server, and what is withheld from it (see `token_of_environment`)."""
    token, withheld = page.token if token is None else token, ""
    if token is None:
        token, withheld = token_of_environment(page.url, is_of_folder=page.is_of_folder)
    if token is not None and not (isinstance(token, str) and token.isascii() and token.isprintable()):
        raise ConnectError("the token has characters that no header can hold; give printable ASCII")
    return token, withheld


class _ConnectContext(AbstractAsyncContextManager[Run]):
    """The life of a connection inside a task."""

    def __init__(self, make_server: Callable[[], RunSource]) -> None:
        self._make_server = make_server

    async def __aenter__(self) -> Run:
        server = self._make_server()
        try:
            known = await _find(server)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await server.aclose()
            raise
        self._connection = connection = NetworkConnection(server, known)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(connection.work, name="stagecast connection")
        return Run(connection)

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        connection = self._connection
        connection.finish()
        try:
            with anyio.move_on_after(None if error is None else _LEAVE_S, shield=error is not None):
                await connection.sent.wait()
        finally:
            connection.working.cancel()
            try:
                await self._tasks.__aexit__(None, None, None)  # without the exception, which it would wrap in a group
            finally:
                with anyio.CancelScope(shield=True):
                    await connection.aclose()
        if error is None and connection.unreported is not None:
            raise connection.unreported


class NetworkConnection:
    """The run protocol over the network.

    One task posts commands, and asks for the cursor of each stream that begins between them.

    Args:
        known: The run when the block was entered.
    """

    def __init__(self, server: RunSource, known: RunSnapshot) -> None:
        self.unreported: ConnectError | None = None
        """Why a command failed, until this has been raised."""
        self.sent = anyio.Event()
        """Set after `finish`, once every command was sent or has failed."""
        self.working = anyio.CancelScope(shield=True)
        """Ends `work`, which a cancellation of the block does not."""
        self._server = server
        self._known = known
        server.over = known.run.status not in UNDER_WAY
        self._jobs: deque[Callable[[], Awaitable[None]]] = deque()
        self._wakeup = Wakeup()
        self._finishing = False
        self._left = ConnectionLost(f"the block of connect({server.url!r}) was left: wait for the run inside of it")
        self._failure: ConnectError | None = None
        self._waits: set[anyio.CancelScope] = set()
        self._followers: set[JournalFollower] = set()
        self._folding = anyio.Lock()
        self._builder = ResultBuilder(known)
        self._patience = Patience(server)  # of commands
        self._folded: JournalFollower | None = None

    # -------------------------------------------------------------------------------------------- the protocol

    @property
    def run_id(self) -> str:
        return self._server.run_id

    def send(self, command: AnyCommand) -> None:
        data = encode_command(command)
        if not self._finishing:
            self._do(functools.partial(self._post, command, data))
        elif not self._server.over:
            raise self._left

    def events(self, since: int | None, types: Iterable[type[Event]] | None) -> EventStream:
        kinds = journalled_types(types)
        follower = self._follow(since)
        stream = NetworkEventStream(self, follower, kinds)
        # A stream that is dropped is closed too; the garbage collector may run on any thread.
        close = functools.partial(self._do, functools.partial(self.close, follower))
        weakref.finalize(stream, close).atexit = False
        return stream

    async def result(self) -> RunResult:
        async with self._folding:  # of several tasks that wait, one folds for all
            if self._folded is None:
                self._folded = self._follow(max(0, self._known.cursor - LOOK_BACK) if self._server.summarises else 0)
            follower = self._folded
            with contextlib.suppress(anyio.EndOfStream):
                while not follower.ended:
                    with self.waiting():
                        self._builder.add(await follower.read())
                    if self._builder.is_full:
                        raise self._server.violated("sends more names of metrics and checkpoints than a run has")
        return _outcome(self._builder.result, self.run_id)

    # ------------------------------------------------------------------------------------------ waiting for the run

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Interrupt the block, and raise, when a command has failed, before it or meanwhile."""
        if self._failure is self._left:
            raise self._left
        if self.unreported is not None:
            unreported, self.unreported = self.unreported, None
            raise unreported
        scope = anyio.CancelScope()
        self._waits.add(scope)
        try:
            with scope:
                yield
        finally:
            self._waits.discard(scope)
        if scope.cancelled_caught and self._failure is not None:
            self.unreported = None
            raise self._failure

    def _interrupt(self, failure: ConnectError) -> None:
        self._failure = failure
        for scope in self._waits:
            scope.cancel()

    def _follow(self, since: int | None) -> JournalFollower:
        follower = JournalFollower(self._server, since)
        self._followers.add(follower)
        if since is None:
            self._do(functools.partial(self._ask_where, follower))
        return follower

    async def close(self, follower: JournalFollower) -> None:
        """Stop following."""
        self._followers.discard(follower)
        await follower.aclose()

    # ------------------------------------------------------------------------------------------------- its task

    def _do(self, job: Callable[[], Awaitable[None]]) -> None:
        """Append a job for the task. Any thread."""
        self._jobs.append(job)
        self._wakeup.set()

    async def work(self) -> None:
        """Do the jobs in order, until `finish`; a cancellation of the block leaves time for the rest."""
        with self.working:
            while self._jobs or not self._finishing:
                if self._jobs:
                    await self._jobs.popleft()()
                else:
                    self._patience.reset()  # only commands that wait together share the time
                    await self._wakeup.wait(None)
            self.sent.set()

    def finish(self) -> None:
        """Take no more commands."""
        self._finishing = True
        self._wakeup.set()

    async def aclose(self) -> None:
        """Disconnect; raises `ConnectionLost` in the tasks that wait."""
        self._interrupt(self._left)
        try:
            while self._waits:  # noqa: ASYNC110  # each is cancelled, and about to release its connection
                await anyio.sleep(0.001)
            for follower in list(self._followers):
                await follower.disconnect()
            await self._server.aclose()
        finally:
            self._wakeup.close()

    async def _post(self, command: AnyCommand, data: bytes) -> None:
        server = self._server
        try:
            await self._patience.ask(
                functools.partial(server.command, data), lambda: 0.0 if server.over else server.give_up_s
            )
        except ConnectionLost as lost:
            self._not_taken(command, lost)
        except ConnectError as error:
            if error.status == _NOT_UNDER_WAY and not server.over:
                with contextlib.suppress(Unreachable, ConnectError):
                    server.over = (await server.snapshot()).run.status not in UNDER_WAY
            name = type(command).__name__.lower()
            self._not_taken(command, CommandRefused(f"the command {name!r} was not taken: {error}", error.status))

    def _not_taken(self, command: AnyCommand, why: ConnectError) -> None:
        if self._server.over:
            logger.info(f"{command!r:.80} came after the end of the run")
            return
        logger.warning(f"{command!r:.80} did not get through: {why}")
        self.unreported = why
        self._interrupt(why)

    async def _ask_where(self, follower: JournalFollower) -> None:
        server = self._server
        try:
            snapshot = await Patience(server).ask(server.snapshot, lambda: 0.0 if follower.ended else server.give_up_s)
        except ConnectError as error:
            follower.begin_at(error)
        else:
            follower.begin_at(snapshot.cursor)


class NetworkEventStream(BatchedStream):
    """The `events.protocol.EventStream` of a run that is watched over the network.

    A slow consumer loses nothing and costs little memory: the journal is the queue. Receiving raises `ConnectError` if
    the server does not send the events, or a command has failed.
    """

    def __init__(
        self, connection: NetworkConnection, follower: JournalFollower, types: frozenset[type[Event]] | None
    ) -> None:
        super().__init__()
        self._connection = connection
        self._follower = follower
        self._types = types
        self._closed_at: int | None = None

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned, or skipped because of its type."""
        if self._closed_at is not None:
            return self._closed_at
        return self._ready[0].seq - 1 if self._ready else self._follower.cursor

    async def _next_batch(self) -> list[Event]:
        while True:
            if self._follower.ended:
                raise anyio.EndOfStream
            with self._connection.waiting():
                batch = await self._follower.read()
            if self._types is not None:
                batch = [event for event in batch if type(event) in self._types]
            if batch:
                return batch

    async def aclose(self) -> None:
        """Stop receiving and drop the rest; `cursor` keeps its value."""
        self._closed_at = self.cursor
        self._ready.clear()
        await self._connection.close(self._follower)


async def _find(server: RunSource) -> RunSnapshot:
    try:
        if not server.run_id:
            await server.choose()
        return await server.snapshot()
    except Unreachable as error:
        raise ConnectError(
            f"no run is served at {server.url}: {error}; see that the run, or `stagecast watch`, is under way there"
        ) from error


def _outcome(result: RunResult | None, run_id: str) -> RunResult:
    run = f"run {plain_text(run_id, 80)}"
    if result is None:
        raise ConnectedRunLost(f"{run} is lost: its process died before the run ended; resume='auto' resumes it")
    if result.status == "failed":
        why = plain_text(result.reason or "", 1_000)
        raise ConnectedRunFailed(f"{run} failed after global_step {result.global_step}: {why}", result)
    if result.status == "cancelled":
        raise RunCancelled(plain_text(result.reason, 1_000) if result.reason else f"{run} was cancelled")
    return result
