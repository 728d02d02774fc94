"""The trainer and the doors to a run."""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from events.checkpoint.settings import Checkpoints
from events.errors import RunCancelled, StagecastError
from events.journal.writer import Journal
from events.log import Warned, collecting, collects, flush_stderr
from events.protocol import RunResult
from events.run.folder import run_id_of
from events.run.run import Run
from events.sink import Place
from events.strict import argument_problems, refusing
from trainer.arguments import TrainerArguments, trainer_aliases
from trainer.checkpoint.fetch import KEYWORDS
from trainer.checkpoint.init_from import InitFrom
from trainer.distributed.ending import arm
from trainer.distributed.launcher import NO_JOB, Job
from trainer.distributed.world import World, opened
from trainer.errors import ArgumentsError, RunInterrupted, RunTerminated
from trainer.hooks.hooks import TaskName
from trainer.loop.control import Control
from trainer.module_interface import ModuleInterface
from trainer.peers import TRAIN_ARGUMENTS, TRAINER_METHODS
from trainer.run.background import Background, handle_of
from trainer.run.calling_thread import interruptibly, run_here
from trainer.run.checks import (
    check_checkpoints,
    check_folder,
    check_members,
    check_named,
    check_sinks,
    check_upload,
    common_facts,
    members,
    numbered,
)
from trainer.run.context import RunContext
from trainer.run.defaults import console, default_sinks, new_run_id
from trainer.run.observers import Callback, SinkLike, split
from trainer.run.place import RunPlace, is_within
from trainer.run.record import RunRecord, plain_config
from trainer.run.relocation import relocating
from trainer.run.session import Session, in_turn

_ALIASES = trainer_aliases("set {} in TrainerArguments")


class Trainer:
    """Trains a module and publishes what happens.

    Each call of `train`, `run` or `test` is a run of its own (a new attempt at the same run, if ``run_id`` is
    given). The module is trained in place.

    Args:
        module: What to train. One run at a time may use it.
        arguments: How to train; the defaults if None.
        callbacks: Each gets every hook once, in order, on a thread of its own; pair one with a `Delivery` to choose
            otherwise.
        sinks: Observers of the events. None: the console in `train` and `test`; in `run` and `start` nothing, but in a
            notebook the console, which is a live display there. Pair one with a `Delivery` to choose how events are
            delivered to it.
        alerts: Sinks beside those, such as `sinks.Alert`; they leave the default console as it is.
        sinks_in: Where sinks run whose delivery has no ``runs_in``. ``"thread"``: each on a thread of this process.
            ``"process"``: all in one process of their own, the sink host, which reads the journal: what they compute
            never holds the loop's interpreter, and if the host dies, another continues. Their output is in
            ``sinks/host.log`` in the run's folder.
        journal: Whether and how the run keeps its events on disk; on by default.
        run_id: The run's name. None: a new one each time (once, with ``run_dir``), or for several ranks the id of
            torchrun's job. With the folder of an earlier attempt, this is the next attempt at that run. Only this name
            identifies the run's checkpoints: use it for one run only.
        run_dir: The run's folder; by default ``runs/RUN_ID`` below the working directory. Without a journal, without
            this and without `Checkpoints`, nothing is written.
        checkpoints: When checkpoints are taken and how many are kept. True: the defaults of `Checkpoints`, if the run
            has a folder.
        resume: The checkpoint that the run continues from. ``"auto"``: the newest valid one in the run's folder (or
            where it uploads to, if the folder has none), or a new run if there is none; needs ``run_id`` or
            ``run_dir``. ``"best"``: the one with the best `Checkpoints.best`. A path: of a checkpoint, or of a run's
            folder. An address in a remote store. None: start a new run; ``"auto"`` in ranks that torchrun has
            restarted. `test` takes over the module's state only.
        init_from: Where a new run takes its weights from: a checkpoint, a run's folder (its newest checkpoint), an
            address in a remote store, a safetensors file, or a folder with ``model.safetensors``. It starts at step 0
            with new optimizers and a history of its own. Every key must fit; `InitFrom` renames them, and takes a part.
            A run that resumes ignores it, so that a job which is restarted may give both this and ``resume="auto"``.
        config: Your own hyperparameters: a mapping, dataclass, Struct or namespace, nested as you like. They are
            recorded in the run's folder (``config.json``) and in `RunStarted`, and every logger shows them as it shows
            hyperparameters. What JSON cannot hold becomes text. Secrets are masked: passwords and tokens of URLs, and
            texts with names such as ``api_key``. The arguments that `launch` or ``stagecast train`` passes to a factory
            are recorded in the same way; where both have a name, this value is recorded.

    Raises:
        ArgumentsError: An argument is wrong.
    """

    if not TYPE_CHECKING:  # a type checker must see `__init__` and the real attributes

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            """Name arguments that `__init__` does not have, and what serves instead."""
            takes = inspect.signature(functools.partial(cls.__init__, None))
            try:
                takes.bind_partial(*args, **kwargs)
            except TypeError:
                problems = argument_problems(takes, args, kwargs, _ALIASES)
                raise ArgumentsError(f"{cls.__name__}: {'; '.join(problems)}") from None
            return super().__new__(cls)

        def __getattr__(self, name: str) -> Any:
            served = TRAINER_METHODS.get(name)
            instead = f"; {served}" if served is not None else ""
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}{instead}", name=name, obj=self
            )

    @collects
    def __init__(
        self,
        module: ModuleInterface,
        arguments: TrainerArguments | None = None,
        *,
        callbacks: Iterable[Callback] = (),
        sinks: Iterable[SinkLike] | None = None,
        alerts: Iterable[SinkLike] = (),
        sinks_in: Place = "thread",
        journal: bool | Journal = True,
        run_id: str | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        checkpoints: bool | Checkpoints = True,
        resume: str | os.PathLike[str] | None = None,
        init_from: str | os.PathLike[str] | InitFrom | None = None,
        config: Any = None,
    ) -> None:
        self.module = module
        self.arguments = arguments if arguments is not None else TrainerArguments()
        self._warned: list[Warned]  # what was logged on the way to a run: published by each
        problems: list[str] = []
        self._callbacks = members("callbacks", callbacks, problems)
        self._sinks = None if sinks is None else members("sinks", sinks, problems)
        self._alerts = members("alerts", alerts, problems)
        self._sinks_in: Place = sinks_in
        self._journal = Journal() if journal is True else None if journal is False else journal
        self._run_id = run_id
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._resume = resume
        self._config = plain_config(config, problems)
        self._command_line: str | None = None
        self._background: Background | None = None
        check_checkpoints(checkpoints, resume, init_from, problems)
        check_members(self.module, self.arguments, self._callbacks, problems)
        observers = numbered("sinks", self._sinks or ()) | numbered("alerts", self._alerts)
        check_sinks(observers, sinks_in, self._journal, problems)
        check_folder(self._journal, run_id, run_dir, problems)
        if not relocating.get():
            check_named(run_id, run_dir, resume, problems)
        if problems:
            raise ArgumentsError("Trainer: " + "; ".join(problems))
        self._init_from = init_from if isinstance(init_from, InitFrom | None) else InitFrom(os.fspath(init_from))

    @refusing(TRAIN_ARGUMENTS)
    def train(self) -> RunResult:
        """Train on the calling thread, and wait until the observers are drained.

        The event loop runs on a thread of its own, so this works on any thread, inside a running event loop too (which
        it blocks). On the main thread the first SIGINT or SIGTERM stops the run as `Run.stop` does, with a checkpoint,
        and then raises `RunInterrupted` or `RunTerminated`. A second one ends the run at once with KeyboardInterrupt or
        SystemExit and leaves the observers at most a moment. The handlers are restored. A signal that the process
        ignores stays ignored.

        Raises:
            RunFolderError: the run's folder cannot be used.
            RunInterrupted: a SIGINT arrived; the run was stopped, and ``result`` holds its result.
            RunTerminated: the same for a SIGTERM.
            BaseException: what a step, or an observer whose policy is fatal, raised; as itself.
        """
        __tracebackhide__ = True  # IPython and pytest show the user's frames only
        return self._run_here("train")[1]

    @refusing(TRAIN_ARGUMENTS)
    def validate(self) -> dict[str, float]:
        """Run one validation over the dataloaders of `ModuleInterface.get_val_dataloaders`, as `train` runs training.

        The validation hooks of the module and the callbacks run; nothing is judged, and no checkpoint is taken. With
        ``resume`` or ``init_from``, the weights are those of that checkpoint: ``resume="best"`` validates the best one.
        They are the averaged ones if its run has validated these, or as a given callback (`EMA`, `SWA`) chooses.

        Returns:
            The metrics by name: ``val_loss``, and all that was logged; those of a dataloader with a key end with it.

        Raises:
            ContractError: the module has no validation dataloaders.
            StagecastError: the validation was stopped before its end.
            RunInterrupted: a SIGINT stopped it, as for `train`.
            RunTerminated: a SIGTERM stopped it.
        """
        __tracebackhide__ = True
        return _whole("validation", self._run_here("validate")[1]).metrics

    @refusing(TRAIN_ARGUMENTS)
    def test(self) -> dict[str, tuple[Any, ...]]:
        """Run the test stage over every dataloader of `ModuleInterface.get_test_dataloaders`, as `train` runs training.

        Returns:
            Per key the outputs of ``test_step``, collated, in host memory.

        Raises:
            ContractError: the module has no test dataloaders.
            EpochOutputsTooLarge: the outputs exceed ``epoch_outputs_limit_bytes``.
            StagecastError: the test was stopped before its end, so there are no whole outputs.
            RunInterrupted: a SIGINT stopped it, as for `train`.
            RunTerminated: a SIGTERM stopped it.
        """
        __tracebackhide__ = True
        session, result = self._run_here("test")
        _whole("test", result)
        return session.loop.task.outputs

    @refusing(TRAIN_ARGUMENTS)
    def run(self) -> AbstractAsyncContextManager[Run]:
        """Train in a thread, inside a host's event loop, under asyncio or trio::

            async with trainer.run() as run:
                async for event in run.events(since=0):
                    ...
            result = await run.result()

        Leaving the block waits for the run and raises what it raised. An exception in the body, or any cancellation,
        stops the loop at its next step, waits for it and drains the observers; then it propagates unchanged.

        Raises:
            RunFolderError: the run's folder cannot be used.
            TrainingThreadStuck: the run was cancelled and the loop did not reach a step boundary in time.
        """
        return RunContext(self)

    @refusing(TRAIN_ARGUMENTS)
    def start(self) -> Run:
        """Train in the background, for notebooks, where a run outlives the cell that starts it; returns once it runs::

            run = trainer.start()            # in one cell
            result = await run.result()      # in another, after run.stop() or at the end

        The loop and its event loop are on threads of their own, so a cell that blocks does not hold up the run. The
        methods of the returned `Run` work in any thread and event loop; its events are read from the journal. The run
        stops, with a checkpoint, when nothing refers to the returned object any more, or when the program ends.

        Raises:
            RunFolderError: the run's folder cannot be used.
            StagecastError: a run that this trainer has started is still under way.
        """
        __tracebackhide__ = True
        if self._background is not None and not self._background.over.is_set():
            raise StagecastError(self._background.refusal)
        self._background = run = Background(self, self._sinks_here(default_sinks()))
        run.start()
        return handle_of(run)

    def _run_here(self, task: TaskName, control: Control | None = None) -> tuple[Session, RunResult]:
        __tracebackhide__ = True
        on_main_thread = threading.current_thread() is threading.main_thread()
        control = control or Control()
        with opened(self.arguments) as world:
            if world.size > 1:
                arm(world.rank)
            place = self._place_of(world, interruptibly)
            sinks = self._sinks_here((console(),)) if world.leads else []
            try:
                session = run_here(
                    lambda: self._session(task, control, place, sinks, interactive=on_main_thread, on_stderr=True),
                    control,
                )
            finally:
                flush_stderr()  # before the output of the caller
        try:
            result = session.outcome()
        except BaseException:
            session.forget_error()
            raise
        if control.stopped_by is not None:
            raise RunInterrupted(result) if control.stopped_by == "SIGINT" else RunTerminated(result)
        return session, result

    def _place_of(self, world: World, wait_for: Callable[[Callable[[], None]], object]) -> RunPlace:
        """Choose the folder, and fetch the checkpoint to resume from: on rank 0, for all ranks."""
        job = Job.next() if world.is_distributed else NO_JOB
        # A launcher counts the restarts of its own host's failures, and not those for which another has asked.
        job = job._replace(restarted=any(world.gather(job.restarted)))

        def choose() -> RunPlace | None:
            place = self._place(job) if world.leads else None
            if place is not None and place.is_remote:
                wait_for(place.fetch)
            return place

        place = world.together(choose)
        chosen = world.share(place.chosen if place is not None else None)
        if place is None:
            assert chosen is not None
            place = RunPlace(*chosen)
        place.world = world
        return place

    @collects
    def _place(self, job: Job = NO_JOB) -> RunPlace:
        resume = "auto" if self._resume is None and job.restarted else self._resume
        run_id = self._run_id or self._known_run_id(resume) or job.run_id or new_run_id()
        checkpoints, run_dir = self._checkpoints, self._run_dir
        self._run_id = run_id if run_dir is not None else self._run_id  # `validate` after `train` is of the same run
        has_folder = self._journal is not None or run_dir is not None or isinstance(checkpoints, Checkpoints)
        has_folder = has_folder or resume in KEYWORDS
        settings = Checkpoints() if checkpoints is True else checkpoints or None
        folder = Path(run_dir or Path("runs") / run_id)
        if settings is not None and settings.upload is not None:
            check_upload(settings.upload, run_id, folder)
        if not has_folder:
            return RunPlace(run_id, None, None, resume, self._init_from)
        return RunPlace(run_id, folder, settings, resume, self._init_from)

    def _known_run_id(self, resume: str | os.PathLike[str] | None) -> str | None:
        """The id of the run that the given folder holds, for a job that is restarted and names only that.

        Raises:
            ArgumentsError: the id is the run's address in the remote store, and the folder does not have it.
        """
        run_dir, settings = self._run_dir, self._checkpoints
        if run_dir is None or resume is None or not is_within(resume, run_dir):
            return None
        run_id = run_id_of(run_dir)
        if run_id is None and isinstance(settings, Checkpoints) and settings.upload is not None:
            raise ArgumentsError(
                f"resume={resume!r}: {os.fspath(run_dir)} holds no run id, without which its uploads cannot be found;"
                f" give run_id"
            )
        return run_id

    def _sinks_here(self, default: tuple[SinkLike, ...]) -> list[SinkLike]:
        """The sinks, as their ``bound`` method describes them on the thread that starts the run."""
        sinks: list[Any] = []
        for one in (*(default if self._sinks is None else self._sinks), *self._alerts):
            sink, delivery = split(one)
            if callable(bound := getattr(sink, "bound", None)):
                sink = bound()
            sinks.append(sink if delivery is None else (sink, delivery))
        return sinks

    def _session(
        self,
        task: TaskName,
        control: Control,
        place: RunPlace,
        sinks: Iterable[SinkLike],
        *,
        interactive: bool,
        on_stderr: bool,
    ) -> Session:
        def make() -> Session:
            return Session(
                self.module,
                self.arguments,
                task=task,
                control=control,
                callbacks=self._callbacks,
                sinks=sinks,
                journal=self._journal,
                place=place,
                interactive=interactive,
                on_stderr=on_stderr,
                sinks_in=self._sinks_in,
                record=RunRecord(type(self.module), self._config, self._command_line),
            )

        with collecting([*self._warned, *place.warned]):
            if place.world.size == 1:
                return make()
            return in_turn(make, place, common_facts(task, self.module, self.arguments, self._callbacks))


def _whole(what: str, result: RunResult) -> RunResult:
    if result.status != "finished":
        raise RunCancelled(f"the {what} was {result.status} before its end ({result.reason})")
    return result
