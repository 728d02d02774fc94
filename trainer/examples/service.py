"""A training service: starts runs, in this process or in their own, and lists, stops, pauses and checkpoints them.

``python -m trainer.examples.service`` serves it at http://127.0.0.1:8000/docs, and the page of all runs at ``/live/``.
Embedding needs three parts: a task group that outlives requests and holds the runs (`trainer.run_manager`), a lifespan
that stops them cleanly, and the mounted live application.
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from events.errors import CheckpointError
from events.run.run import Run
from sinks.live.access import Access, Refused
from sinks.live.access import Request as AccessRequest
from sinks.live.app import LiveApp
from sinks.live.client import MOST_INBOUND
from sinks.live.runs import RunsOfFolder
from sinks.live.server import link_to
from sinks.live.token import choose_token
from trainer import Trainer, TrainerArguments, launch
from trainer.run_manager import ManagedRun, RunManager, State, Unavailable


@asynccontextmanager
async def open_run(factory: str, arguments: dict[str, Any], launched: bool) -> AsyncIterator[Run]:
    """Build a trainer and open its run: in a process of its own, or in a thread of this one.

    Launch large runs: the Python code of their steps does not slow down the service, and their crash does not end it.
    """
    if launched:
        async with launch(factory, arguments) as run:
            yield run
    else:
        # On a thread of its own, because it imports and reads data, and the host's threads may all be busy.
        trainer = await anyio.to_thread.run_sync(_build, factory, arguments, limiter=anyio.CapacityLimiter(1))
        async with trainer.run() as run:
            yield run


def _build(factory: str, arguments: dict[str, Any]) -> Trainer:
    trainer: Trainer = pkgutil.resolve_name(factory)(**arguments)
    return trainer


def digits(run_id: str, run_dir: str, epochs: int = 10) -> Trainer:
    """A recipe. With ``resume="auto"`` a run that is started again resumes from its newest checkpoint."""
    from trainer.examples.digits import Digits

    return Trainer(Digits(), TrainerArguments(epochs=epochs, seed=0), run_id=run_id, run_dir=run_dir, resume="auto")


RECIPES = {"digits": "trainer.examples.service:digits"}
"""The recipes that clients may start; they must not name arbitrary functions."""


class Order(BaseModel):
    """A client's request for a run."""

    recipe: str
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]  # also the name of its folder
    arguments: dict[str, Any] = {}
    launched: bool = False


class Shown(BaseModel):
    """A run in answers to clients."""

    run_id: str
    state: State
    position: int | None
    reason: str | None

    @classmethod
    def of(cls, job: ManagedRun, manager: RunManager) -> Shown:
        """The current state of a job."""
        return cls(run_id=job.run_id, state=job.state, position=manager.position(job), reason=job.reason)


async def _manager(request: Request) -> RunManager:
    manager: RunManager = request.state.manager  # from the lifespan
    return manager


Manager = Annotated[RunManager, Depends(_manager)]


async def _named(run_id: str, manager: Manager) -> ManagedRun:
    if run_id not in manager.jobs:
        raise HTTPException(404, f"no run {run_id} was started here")
    return manager.jobs[run_id]


Named = Annotated[ManagedRun, Depends(_named)]


async def _running(job: Named) -> Run:
    if job.run is None or job.over.is_set():
        raise HTTPException(409, f"run {job.run_id} is {job.state}")
    return job.run


Running = Annotated[Run, Depends(_running)]


routes = APIRouter(prefix="/runs")


@routes.get("")
async def list_all(manager: Manager) -> list[Shown]:
    return [Shown.of(job, manager) for job in manager.jobs.values()]


@routes.get("/{run_id}")
async def show(job: Named, manager: Manager) -> Shown:
    return Shown.of(job, manager)


@routes.post("/{run_id}/stop", status_code=202)
async def stop(job: Named, manager: Manager, reason: str = "requested by a client") -> Shown:
    manager.stop(job, reason)
    return Shown.of(job, manager)


@routes.post("/{run_id}/pause", status_code=202)
async def pause(run: Running) -> None:
    run.pause()


@routes.post("/{run_id}/resume", status_code=202)
async def resume(run: Running) -> None:
    run.resume()


@routes.post("/{run_id}/checkpoint")
async def checkpoint(run: Running) -> str:
    with _conflict_if(CheckpointError):
        return await run.checkpoint()  # until it is durable


@routes.delete("/{run_id}", status_code=202)
async def cancel(job: Named, manager: Manager) -> Shown:
    job.scope.cancel()
    return Shown.of(job, manager)


def create_app(
    folder: Path,
    recipes: Mapping[str, str] = RECIPES,
    *,
    at_once: int = 1,
    stop_s: float = 60.0,
    token: str | None = None,
) -> FastAPI:
    """Build the service.

    Args:
        folder: The folder of the run folders.
        recipes: Factories of trainers by name: ``package.module:function`` with ``run_id``, ``run_dir`` and arguments.
        at_once: Maximum running runs per device.
        stop_s: Seconds that runs may take to stop cleanly when the service shuts down.
        token: The token that clients need. None: every client on this machine may start and stop runs.
    """
    folder = folder.absolute()
    access = Access(token, commands=True, hosts=None if token is not None else ("127.0.0.1", "localhost"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, RunManager]]:
        async with RunManager.open(at_once, stop_s) as manager:
            yield {"manager": manager}

    app = FastAPI(title="stagecast", lifespan=lifespan)
    app.mount("/live", LiveApp(RunsOfFolder(folder), access))  # the page, Server-Sent Events, WebSocket, `connect`
    app.add_middleware(Guard, access=access)

    @app.post("/runs", status_code=201)
    async def start(order: Order, manager: Manager) -> Shown:
        if order.recipe not in recipes:
            raise HTTPException(404, f"there is no recipe {order.recipe}; use one of {', '.join(recipes)}")
        place = {"run_id": order.run_id, "run_dir": str(folder / order.run_id)}
        opened = partial(open_run, recipes[order.recipe], {**order.arguments, **place}, order.launched)
        with _conflict_if(Unavailable):
            return Shown.of(manager.start(order.run_id, opened), manager)

    app.include_router(routes)
    return app


class Guard:
    """Applies the live application's access checks to ``/runs``, before a request's body is read.

    A dependency of FastAPI would run too late, after the body of any size was read and decoded.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application around another."""
        if scope["type"] == "http" and (request := AccessRequest(scope)).path.partition("/")[0] == "runs":
            try:
                self._access.check_host(request)
                self._access.check_origin(request)
                self._access.check_token(request)
                await self._access.ask(request)
                if "transfer-encoding" in request.headers:
                    raise Refused(411, "the request has no Content-Length; send one instead of chunks")
                if int(request.headers.get("content-length", 0)) > MOST_INBOUND:
                    raise Refused(413, f"the request exceeds {MOST_INBOUND} bytes; send fewer")
            except Refused as refused:
                answer = JSONResponse({"detail": refused.detail}, refused.status_code, refused.headers)
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


@contextmanager
def _conflict_if(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except kind as error:
        raise HTTPException(409, str(error)) from None


def main() -> None:
    """Serve on this machine. SIGTERM and Ctrl-C stop the runs with checkpoints, from which they can resume."""
    parser = argparse.ArgumentParser(prog="python -m trainer.examples.service", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="of run folders (default: runs)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    parser.add_argument(
        "--no-token", action="store_true", help="allow every user of this machine to start and stop runs"
    )
    options = parser.parse_args()
    token = choose_token(False if options.no_token else None, "127.0.0.1")
    app = create_app(options.folder, token=token)
    print(f"the runs can be watched at {link_to(f'http://127.0.0.1:{options.port}/live/', token)}", flush=True)
    uvicorn.run(app, host="127.0.0.1", port=options.port, timeout_graceful_shutdown=2)


if __name__ == "__main__":
    main()
