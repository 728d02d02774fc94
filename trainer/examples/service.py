"""A training service: starts runs, in this process or in their own, and lists, stops, pauses and checkpoints them.

``python -m trainer.examples.service`` serves it at http://127.0.0.1:8000/docs, and the page of all runs at ``/``.
Requests are kept in the run folders: a service that was killed, or stopped, continues its jobs when it starts again.
Embedding needs three parts: a lifespan that holds the runs in a task group and stops them cleanly
(`trainer.run_manager`), the mounted live application, and its access checks around the other routes.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import msgspec
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from events.errors import CheckpointError
from events.protocol import Pause, Resume
from events.run.job import JobState, ServiceJob
from events.run.run import Run
from events.strict import unknown_names
from events.text import plain_text
from sinks.live.access import Access, Refused
from sinks.live.access import Request as AccessRequest
from sinks.live.app import LiveApp
from sinks.live.client import MOST_INBOUND
from sinks.live.runs import RunsOfFolder
from sinks.live.server import link_to
from sinks.live.token import choose_token
from trainer import Trainer, TrainerArguments, launch
from trainer.job_folder import Unavailable
from trainer.remote.launch_arguments import argument_errors
from trainer.run_manager import RunManager


def digits(run_id: str, run_dir: str, epochs: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 10) -> Trainer:
    """A recipe. With ``resume="auto"`` a run that is started again resumes from its newest checkpoint.

    The annotations of a recipe decide which arguments clients may give.
    """
    from trainer.examples.digits import Digits

    return Trainer(Digits(), TrainerArguments(epochs=epochs, seed=0), run_id=run_id, run_dir=run_dir, resume="auto")


RECIPES = {"digits": "trainer.examples.service:digits"}
"""The recipes that clients may start; they must not name arbitrary functions."""


class Order(BaseModel):
    """A client's request for a run."""

    model_config = ConfigDict(extra="forbid")

    recipe: str
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]  # also the name of its folder
    arguments: dict[str, Any] = {}
    launched: bool = False
    """Whether it trains in a process of its own. Launch large runs: their steps do not slow down the service."""
    again: bool = False
    """Whether to continue an earlier run of this name."""

    @model_validator(mode="before")
    @classmethod
    def _names_are_known(cls, given: Any) -> Any:
        if isinstance(given, dict) and (unknown := [name for name in given if name not in cls.model_fields]):
            raise ValueError(plain_text("; ".join(unknown_names(unknown, list(cls.model_fields)))))
        return given


class Shown(BaseModel):
    """A run in answers to clients."""

    run_id: str
    recipe: str
    arguments: dict[str, Any]
    state: JobState
    reason: str | None
    """Why it stopped, or failed."""
    position: int | None
    """Its position in the queue, from 1."""
    asked: float
    """Unix seconds of the request."""


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


_REFUSALS: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (401, 403, 404, 409, 411, 413, 421)}


@asynccontextmanager
async def open_run(folder: Path, recipes: Mapping[str, str], job: ServiceJob) -> AsyncIterator[Run]:
    """Build the trainer of a job and open its run: in a process of its own, or in a thread of this one."""
    order = Order.model_validate(job.request)
    if order.recipe not in recipes:  # the service has been started with others
        raise LookupError(f"{order.recipe!r} is not a recipe of this service; start the service with it")
    factory, place = recipes[order.recipe], {"run_id": job.run_id, "run_dir": str(folder / job.run_id)}
    if order.launched:
        async with launch(factory, {**order.arguments, **place}) as run:
            yield run
    else:
        # On a thread of its own, because it imports and reads data, and the host's threads may all be busy.
        build = partial(_build, factory, {**order.arguments, **place})
        trainer = await anyio.to_thread.run_sync(build, limiter=anyio.CapacityLimiter(1))
        async with trainer.run() as run:
            yield run


def _build(factory: str, arguments: dict[str, Any]) -> Trainer:
    takes: Any = pkgutil.resolve_name(factory)
    trainer: Trainer = takes(**arguments)
    return trainer


async def _manager(request: Request) -> RunManager:
    manager: RunManager = request.state.manager  # from the lifespan
    return manager


Manager = Annotated[RunManager, Depends(_manager)]


async def _named(run_id: str, manager: Manager) -> ServiceJob:
    if not run_id.isascii() or "/" in run_id or "." in run_id or (job := await manager.job(run_id)) is None:
        raise HTTPException(404, f"no run {run_id} was started here")
    return job


Named = Annotated[ServiceJob, Depends(_named)]

routes = APIRouter(prefix="/runs", responses=_REFUSALS)


async def _shown(manager: RunManager, *chosen: ServiceJob) -> list[Shown]:
    jobs = await manager.jobs()
    return [
        Shown(
            run_id=job.run_id,
            recipe=str(job.request.get("recipe")),
            arguments=dict(job.request.get("arguments", {})),
            state=job.state,
            reason=job.reason,
            position=manager.position(job, jobs),
            asked=job.asked,
        )
        for job in chosen or jobs
    ]


@routes.get("")
async def list_runs(manager: Manager) -> list[Shown]:
    """The newest thousand runs, in the order of their requests."""
    return await _shown(manager)


@routes.get("/{run_id}")
async def show_run(job: Named, manager: Manager) -> Shown:
    return (await _shown(manager, job))[0]


@routes.post("/{run_id}/stop", status_code=202)
async def stop_run(job: Named, manager: Manager, reason: str = "requested by a client") -> None:
    """Stop it at its next step, with a checkpoint."""
    with _conflict_if(Unavailable):
        await manager.stop(job.run_id, reason)


@routes.post("/{run_id}/pause", status_code=202)
async def pause_run(job: Named, manager: Manager) -> None:
    with _conflict_if(Unavailable):
        await manager.send(job.run_id, Pause(id="service"))


@routes.post("/{run_id}/resume", status_code=202)
async def resume_run(job: Named, manager: Manager) -> None:
    with _conflict_if(Unavailable):
        await manager.send(job.run_id, Resume(id="service"))


@routes.post("/{run_id}/checkpoint")
async def checkpoint_run(job: Named, manager: Manager) -> str:
    """Take a checkpoint; returns its folder when it is durable."""
    if (run := manager.run(job.run_id)) is None:
        raise HTTPException(409, f"run {job.run_id} is {job.state}, or under way in another process")
    with _conflict_if(CheckpointError):
        return await run.checkpoint()


@routes.delete("/{run_id}", status_code=202)
async def cancel_run(job: Named, manager: Manager) -> None:
    """Cancel it, without a checkpoint."""
    with _conflict_if(Unavailable):
        await manager.cancel(job.run_id)


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
        folder: The folder of the run folders; several processes may share it.
        recipes: Factories of trainers by name: ``package.module:function`` with ``run_id``, ``run_dir`` and arguments.
        at_once: Maximum running runs per device.
        stop_s: Seconds that runs may take to stop cleanly when the service shuts down.
        token: The token that clients need. None: every client on this machine may start and stop runs.
    """
    folder = folder.absolute()
    access = Access(token, commands=True, hosts=None if token is not None else ("127.0.0.1", "localhost"))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, RunManager]]:
        open_job = partial(open_run, folder, recipes)
        async with RunManager.open(folder, open_job, at_once=at_once, stop_s=stop_s) as manager:
            yield {"manager": manager}

    app = FastAPI(title="stagecast", lifespan=lifespan, generate_unique_id_function=lambda route: route.name)
    app.mount("/live", LiveApp(RunsOfFolder(folder), access))  # the page, Server-Sent Events, WebSocket, `connect`
    app.add_middleware(Guard, access=access)
    # `Guard` checks the token; this documents it.
    guarded = [Depends(HTTPBearer(auto_error=False))] if token is not None else []

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        # In ASCII: it may repeat lone surrogates of the request, which cannot be encoded in UTF-8.
        data = json.dumps({"detail": jsonable_encoder(error.errors())})
        return Response(data, 422, media_type="application/json")

    @app.get("/", include_in_schema=False)
    async def page() -> RedirectResponse:
        return RedirectResponse("live/")

    @app.post("/runs", status_code=201, responses=_REFUSALS, dependencies=guarded)
    async def start_run(order: Order, manager: Manager) -> Shown:
        await anyio.to_thread.run_sync(_check, order, recipes)
        with _conflict_if(Unavailable):
            try:
                job = await manager.start(order.run_id, order.model_dump(), again=order.again)
            except ValueError as error:  # a text with lone surrogates, or too much
                raise _invalid([(("arguments",), str(error))]) from None
        return (await _shown(manager, job))[0]

    app.include_router(routes, dependencies=guarded)
    return app


def _check(order: Order, recipes: Mapping[str, str]) -> None:
    """Raise an error with each wrong argument of an order, before it is answered."""
    if order.recipe in recipes:
        found = argument_errors(recipes[order.recipe], order.arguments, frozenset({"run_id", "run_dir"}))
    else:
        found = {"": unknown_names([order.recipe], sorted(recipes))[0]}
    if found:
        places = {name: ("arguments", name) if name else ("recipe",) for name in found}
        raise _invalid([(places[name], text) for name, text in found.items()])


def _invalid(found: list[tuple[tuple[str, ...], str]]) -> RequestValidationError:
    problems = [{"type": "value_error", "loc": ("body", *place), "msg": text} for place, text in found]
    return RequestValidationError(problems)


class Guard:
    """Applies the live application's access checks to the runs, before a request's body is read.

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
