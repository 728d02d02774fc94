"""Finds the checkpoint to resume from, reads it, and puts its state back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from events.checkpoint.files import read_file, read_manifest, read_weights
from events.checkpoint.lineage import AttemptNote, ranked
from events.checkpoint.manifest import MANIFEST_NAME, STATE_NAME, TENSORS_NAME, CheckpointName, Manifest
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CHECKPOINTS_DIR, WEIGHTS_NAME, CheckpointStore
from events.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from events.log import logger
from events.masking import masked
from events.safe_files import UnsafeFile
from trainer.checkpoint.fetch import KEYWORDS, no_name
from trainer.checkpoint.position import SAVED_FIELDS, Position, SavedCallback, SavedState
from trainer.data.rng import RngState
from trainer.data.tensor_state import put_together, tensors_in
from trainer.data.tensors import clone_tensors
from trainer.hooks.hooks import CallbackHooks
from trainer.module_interface import ModuleInterface

OnRejected = Callable[[str, Exception], None]


class Loaded:
    """A checkpoint, read and verified. Its tensors are on the host.

    Raises:
        CheckpointDamaged: it is not whole.
        CheckpointTooNew: a later version wrote it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.state: dict[str, Any] = self._read(STATE_NAME, TENSORS_NAME)
        self.parts = {
            name.removesuffix(".msgpack"): self._read(name, name.removesuffix(".msgpack") + ".safetensors")
            for name in self.manifest.files
            if name.endswith(".msgpack") and name != STATE_NAME
        }
        try:
            msgspec.convert(self.state, SavedState)
            msgspec.convert(self._callback_parts, list[SavedCallback])
        except msgspec.ValidationError as error:
            raise CheckpointDamaged(f"{self.folder / STATE_NAME} is not the state of a run: {error}") from error

    def _read(self, state_name: str, tensors_name: str) -> Any:
        files = self.manifest.files
        if state_name not in files:
            raise CheckpointDamaged(f"{self.folder / MANIFEST_NAME} does not list {state_name}")
        state = read_file(self.folder, state_name, files[state_name])
        tensors = None
        if tensors_name in files:
            tensors = read_file(self.folder, tensors_name, files[tensors_name])
        return put_together(state, tensors, str(self.folder / tensors_name))

    @property
    def _callback_parts(self) -> list[dict[str, Any]]:
        return [part for name, part in self.parts.items() if name.startswith("callback-")]

    @property
    def position(self) -> Position:
        """Where the loop stood."""
        saved = self._kept("position")
        return Position(**{name: saved[name] for name in SAVED_FIELDS if name in saved})

    @property
    def rng(self) -> RngState:
        """The random generators as they were."""
        rng: RngState = self._kept("rng")
        return rng

    @property
    def global_step(self) -> int:
        """Steps finished."""
        return int(self.state["global_step"])

    @property
    def epoch(self) -> int:
        """The epoch that the run is in, or is about to begin."""
        return int(self.state["epoch"])

    def _kept(self, name: str) -> Any:
        """Something of the state, in memory of its own: a tensor that is kept would keep the whole file in memory."""
        return clone_tensors(self.state[name])

    def forget(self) -> None:
        """Let go of everything but what the loop needs to find its place: the rest has been put back."""
        self.state = {name: self._kept(name) for name in ("global_step", "epoch", "position", "rng")}
        self.parts = {name: part for name, part in self.parts.items() if name == "outputs"}

    def restore_module(self, module: ModuleInterface) -> None:
        """Have the module take over its state.

        Raises:
            CheckpointMismatch: it is that of another model; names the keys and shapes. The module is as it was, unless
            it is a submodule that loads in its own way which has refused.
        """
        state, by_default = self.state["module"], takes_state_by_default(module)
        own = _with_own_loading(module) if by_default else ()
        if by_default:
            _check_module(module, state, str(self.folder), own)
        if own or not by_default:
            state = clone_tensors(state)  # it may keep them, and with them the memory of the whole file
        try:
            module.update_state(state)
        except RuntimeError as error:
            if not own:
                raise
            raise CheckpointMismatch(
                f"the checkpoint {self.folder} does not fit {type(module).__name__}, part of which may have taken it"
                f" over: {error}"
            ) from error

    def restore_frozen(self, module: ModuleInterface) -> None:
        """Have the module's parameters train that trained then, and no others."""
        frozen, again = set(self.state["frozen"]), []
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():  # others never need a gradient
                if parameter.requires_grad and name in frozen:
                    again.append(name)
                parameter.requires_grad_(name not in frozen)
        if again:
            logger.warning(
                f"requires_grad of {', '.join(_some(again))} is False again, as in the checkpoint {self.folder}; set it"
                f" in get_optimizers_schedulers() or on_begin_train_epoch() to train them from now on"
            )

    @property
    def optimization(self) -> dict[str, Any]:
        """The state of optimizers and schedulers."""
        # Copies: torch would keep what it gets, and with it the memory of the whole file.
        return {name: self._kept(name) for name in ("optimizers", "schedulers", "kinds")}

    def restore_callbacks(
        self, callbacks: Iterable[CallbackHooks], on_failed_hook: Callable[[CallbackHooks, str, Exception], None]
    ) -> None:
        """Have the callbacks that have a state take over theirs, by their ``state_key``.

        One without a key of its own whose arguments have changed takes the state of the only other one of its class
        that is left, with a warning.

        Args:
            on_failed_hook: Decides by the callback's policy what it means that it refuses.

        Raises:
            CheckpointMismatch: several of one class are left, so whose state is whose is unknown.
        """
        saved = {one["key"]: one for one in [*self.state["callbacks"], *self._callback_parts]}
        found: list[tuple[CallbackHooks, Any]] = []
        left: list[CallbackHooks] = []
        for callback in callbacks:
            if callback.stateful and callback.state_key in saved:
                found.append((callback, saved.pop(callback.state_key)))
            elif callback.stateful:
                left.append(callback)
        unnamed = [one.kind for one in left if not one.has_own_key]
        for callback in left:
            alike = [] if callback.has_own_key else [one for one in saved.values() if one["kind"] == callback.kind]
            if len(alike) > 1 or (alike and unnamed.count(callback.kind) > 1):
                raise CheckpointMismatch(
                    f"{self.folder} has the states of {', '.join(one['key'] for one in alike)}, and which of them is"
                    f" that of {callback.state_key} is unknown; give it the state_key that it had"
                )
            if alike:
                logger.warning(
                    f"{callback.state_key} takes over the state of {alike[0]['key']}, the only other callback of its"
                    f" class in the checkpoint {self.folder}; give it a state_key if it is another one"
                )
                found.append((callback, saved.pop(alike[0]["key"])))
            else:
                logger.warning(f"the checkpoint {self.folder} has no state for the callback {callback.state_key}")
        for callback, one in found:
            try:
                callback.load_state_dict(clone_tensors(one["state"]))
            except Exception as error:  # a supervisor's border: reported, and raised unless it only disables
                on_failed_hook(callback, "load_state_dict", error)
        if saved:
            logger.warning(
                f"the checkpoint {self.folder} has state for callbacks that are not there: {', '.join(saved)}"
            )


class CheckpointPlan:
    """What a run is to do about checkpoints, and where they are.

    Args:
        settings: When to take some; None: it takes none.
        store: Those of this run; None if it has no folder.
        resume: What the user asked to resume from.
        init_from: What the user asked to take weights from, for a run that resumes from nothing.
        url: Where this run's checkpoints are uploaded to, if they are.
        run_id: This run's: of another one no checkpoint is taken, unless the user names it.
    """

    def __init__(
        self,
        settings: Checkpoints | None,
        store: CheckpointStore | None,
        resume: str | os.PathLike[str] | None,
        url: str | None,
        init_from: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.url = url
        self._resume = resume
        self._init_from = init_from
        self._run_id = run_id

    def check(self) -> None:
        """See that there is something at a path that the user gave, before the run begins with anything.

        Raises:
            CheckpointNotFound: There is not. An attempt that began only to say so would end a finished run as failed.
        """
        resume, store = self._resume, self.store
        if resume is not None and resume not in KEYWORDS:
            _check_place("resume", resume, store)
        found = store is not None and resume == "auto" and (store.source is not None or any(store.candidates()))
        if self._init_from is not None and not found:
            _check_place("init_from", self._init_from, None)

    def load(self, on_rejected: OnRejected) -> Loaded | None:
        """Read what is to be resumed from; None for a run that begins anew. Waits for the disk.

        Args:
            on_rejected: Told of each checkpoint that is not whole, and why, before an older one is tried.

        Raises:
            CheckpointError: There is none where the user said, or it cannot be used.
        """
        resume, store = self._resume, self.store
        if resume is None:
            return None
        if self._init_from is not None and resume != "auto":
            logger.warning(
                f"init_from={os.fspath(self._init_from)!r} is ignored; resume={os.fspath(resume)!r} is given"
            )
        if resume not in KEYWORDS:
            return find(resume, store, on_rejected)
        if store is None:
            raise CheckpointNotFound(
                f"resume={resume!r} looks in the run's folder, and this run has none; give run_dir"
            )
        if resume == "best":
            return self._load_best(store, on_rejected)
        loaded = load_from(store, on_rejected, self._run_id)
        if loaded is None and (source := store.source) is not None:
            loaded = find(source, store, on_rejected)
        return loaded

    def name_of(self, loaded: Loaded) -> str | None:
        """Its name, if it is one of this run's; else None."""
        if self.store is None:
            return None
        own = self.store.folder.resolve()
        if own not in (loaded.folder.resolve().parent, loaded.folder.absolute().parent.resolve()):
            return None
        return str(loaded.manifest.name)

    def _load_best(self, store: CheckpointStore, on_rejected: OnRejected) -> Loaded:
        settings = self.settings
        monitor, mode = (
            (None, None) if settings is None or settings.best is None else (settings.best, settings.best_mode)
        )

        def reject(name: str, error: Exception) -> None:
            logger.warning(f"resume='best' skips a checkpoint: {error}")
            on_rejected(name, error)

        for name in ranked(store.scores(monitor, reject), mode):
            try:
                check_owner(store, name, self._run_id)
                return Loaded(store.path(name))
            except (CheckpointDamaged, CheckpointMismatch, CheckpointNotFound) as error:
                reject(str(name), error)
        what = f"with the metric {monitor!r}" if monitor else "with a metric"
        raise CheckpointNotFound(
            f"resume='best': {store.folder} has no whole checkpoint {what} (it has: {_contents(store)}); give the path"
            f" of one, or train with Checkpoints(best=...)"
        )

    def load_weights(self, module: ModuleInterface) -> bool:
        """Have the module take over the weights of ``init_from``. Waits for the disk. Returns whether there are any.

        Raises:
            CheckpointMismatch: They are those of another model; names the keys and shapes. The module is as it was.
            CheckpointError: There are none, or they cannot be read.
        """
        if self._init_from is None:
            return False
        named = Path(self._init_from)
        place = _weights_at(named)
        if place.is_file():
            _load_file(module, place, follow=place == named)
            return True

        def tell(name: str, error: Exception) -> None:
            logger.warning(f"{error}; an older checkpoint is tried")

        find(place, None, tell, "init_from").restore_module(module)
        return True

    def scores_up_to(self, loaded: Loaded) -> dict[int, float]:
        """The monitored metric of each checkpoint up to this one that is still there, by step."""
        settings, store = self.settings, self.store
        if settings is None or settings.best is None or store is None or self.name_of(loaded) is None:
            return {}
        scores = reversed(
            store.scores(settings.best, run_id=loaded.manifest.run_id).items()
        )  # the newest of a step is last
        return {name.step: score.value for name, score in scores if name <= loaded.manifest.name}

    @property
    def resumes(self) -> bool:
        """Whether the user asked to go on from somewhere."""
        return self._resume is not None

    def prepare(self, attempt: int, loaded: Loaded | None) -> None:
        """Note on the disk what an attempt starts from. Raises `CheckpointError` if the disk refuses."""
        if self.settings is None or self.store is None:
            return
        parent = self.name_of(loaded) if loaded is not None else None
        source = os.path.abspath(loaded.folder) if loaded is not None and parent is None else None
        if parent is None and self.store.names():
            logger.warning(
                f"attempt {attempt} does not go on from any checkpoint in {self.store.folder}, which it supersedes"
            )
        try:
            self.store.prepare(AttemptNote(attempt, parent, source, secrets.token_hex(8)))
        except UnsafeFile as error:
            raise CheckpointError(
                f"no checkpoint can be written to {self.store.folder}: {error}; remove that, or give the run another"
                f" folder (run_dir)"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"no checkpoint can be written to {self.store.folder}: {error}; make the folder one that you may write"
                f" to, on a disk with room, give the run another (run_dir), or train with checkpoints=False"
            ) from error


def load_from(store: CheckpointStore, on_rejected: OnRejected, run_id: str | None = None) -> Loaded | None:
    """Read the newest valid checkpoint of a store; None if it has none at all.

    Args:
        on_rejected: Called for each that is not whole or belongs to another run, with the reason; and for a damaged
            note of what an attempt started from.
        run_id: Only those of this run; None: of any.

    Raises:
        CheckpointDamaged: there are checkpoints, and none of them is whole.
        CheckpointTooNew: a later version wrote the newest one.
    """
    tried: list[str] = []
    for note, damage in store.damaged_notes().items():
        on_rejected(note, damage)
    for name in store.candidates():
        try:
            check_owner(store, name, run_id)
            return Loaded(store.path(name))
        except CheckpointMismatch as error:
            logger.warning(f"resume='auto' skips a checkpoint: {error}")
            on_rejected(str(name), error)
        except (CheckpointDamaged, CheckpointNotFound) as error:
            tried.append(str(error))
            on_rejected(str(name), error)
    if tried:
        raise CheckpointDamaged(
            f"none of the {len(tried)} checkpoints in {store.folder} is whole; nothing was changed. The"
            f" newest: {tried[0]}"
        )
    return None


def check_owner(store: CheckpointStore, name: CheckpointName, run_id: str | None) -> None:
    """See that a checkpoint is of this run; None: of any.

    Raises:
        CheckpointMismatch: It is of another run, as one that was copied into the folder is.
        CheckpointError: As `CheckpointStore.manifest`.
    """
    if run_id is not None and (owner := store.manifest(name).run_id) != run_id:
        raise CheckpointMismatch(
            f"{store.path(name)} belongs to run {owner!r:.200}, not to {run_id!r:.200}; to resume from it all the same,"
            f" give its path as resume"
        )


def find(
    path: str | os.PathLike[str], store: CheckpointStore | None, on_rejected: OnRejected, argument: str = "resume"
) -> Loaded:
    """Read the checkpoint that a path means: of itself, or the newest one of a run's folder.

    Args:
        store: The run's own, in which a mere name (``step-500.a1``) is looked for.
        argument: The trainer's argument that gave the path, for messages.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        return _find(path, store, on_rejected, argument)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointNotFound(f"{argument}={os.fspath(path)!r:.200} cannot be looked at: {error}") from error


def _find(
    path: str | os.PathLike[str], store: CheckpointStore | None, on_rejected: OnRejected, argument: str
) -> Loaded:
    folder = _folder_of(path, store)
    if (folder / MANIFEST_NAME).is_file() or CheckpointName.parse(folder.name) is not None:
        return Loaded(folder)
    for stored in (folder / CHECKPOINTS_DIR, folder):
        loaded = load_from(CheckpointStore(stored), on_rejected)
        if loaded is not None:
            return loaded
    raise _not_found(path, argument)


def _folder_of(path: str | os.PathLike[str], store: CheckpointStore | None) -> Path:
    """What a path means, or the mere name of one of the run's own checkpoints."""
    folder = Path(path)
    name = CheckpointName.parse(os.fspath(path))
    if name is not None and store is not None and not folder.exists():
        folder = store.path(name)
    return folder


def _check_place(argument: str, path: str | os.PathLike[str], store: CheckpointStore | None) -> None:
    """See that there is something at a path. Raises `CheckpointNotFound`."""
    try:
        _folder_of(path, store).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _not_found(path, argument) from None
    except (OSError, ValueError):
        pass  # reading it says what is wrong with it


def _not_found(path: str | os.PathLike[str], argument: str) -> CheckpointNotFound:
    text = os.fspath(path)
    if (word := no_name(text)) is not None:
        wrong = f"{word!r} is not a checkpoint name (expected e.g. step-500.a1)"
    else:
        wrong = "there is no checkpoint"
    above = Path(text).parent
    if (names := CheckpointStore(above).names()) and above.name == CHECKPOINTS_DIR:
        wrong += f"; {above} holds {', '.join(_some(map(str, names)))}"
    fix = "or 'auto' or 'best'" if argument == "resume" else "or a safetensors file"
    return CheckpointNotFound(
        f"{argument}={masked(text)!r}: {wrong}; give the folder of a checkpoint or of a run, {fix}"
    )


def _contents(store: CheckpointStore) -> str:
    """What a store holds, for a message: each checkpoint with its metric."""
    shown = []
    for name in store.names():
        try:
            metric = store.manifest(name).metric
        except CheckpointError:
            shown.append(f"{name} (unreadable)")
        else:
            shown.append(str(name) if metric is None else f"{name} ({metric.name} {metric.value:.6g})")
    return ", ".join(_some(shown)) or "none"


def _weights_at(place: Path) -> Path:
    """What ``init_from`` means: a file of weights, or the folder of a checkpoint or of a run."""
    if place.is_file() and (place.parent / MANIFEST_NAME).is_file():
        return place.parent  # one file of a checkpoint, which holds more than weights
    if (place / WEIGHTS_NAME).is_file() and not CheckpointStore(place / CHECKPOINTS_DIR).names():
        return place / WEIGHTS_NAME
    return place


def _load_file(module: ModuleInterface, path: Path, *, follow: bool) -> None:
    """Have a module take over all tensors of a safetensors file. Raises `CheckpointError`.

    Args:
        follow: Whether the file may be a link: the user named it, and not the folder that it is in.
    """
    try:
        found = tensors_in(read_weights(path, follow=follow), str(path))
    except OSError as error:
        raise CheckpointError(f"init_from={masked(str(path))!r} cannot be read: {masked(str(error))}") from error
    except CheckpointDamaged as error:
        raise CheckpointDamaged(
            f"init_from={masked(str(path))!r} cannot be used ({masked(str(error))}); write the weights with"
            f" safetensors.torch.save_file"
        ) from error
    own = module.state_dict()
    # Other writers store tied weights once.
    names = {_memory_of(own[key]): key for key in found if key in own}
    state = found | {key: found[names[at]] for key, value in own.items() if (at := _memory_of(value)) in names}
    exempt = _with_own_loading(module)
    _check_module(module, state, str(path), exempt)
    try:
        module.load_state_dict(state)  # copies them
    except RuntimeError as error:
        raise CheckpointMismatch(f"{path} does not fit {type(module).__name__}: {error}") from error


def _memory_of(value: Any) -> Any:
    """What two names of one tensor have in common."""
    if not isinstance(value, torch.Tensor) or is_lazy(value) or not value.numel():
        return object()
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def takes_state_by_default(module: ModuleInterface) -> bool:
    """Whether the module has left it to the contract how it takes over its state."""
    return type(module).update_state is ModuleInterface.update_state


def _with_own_loading(module: nn.Module) -> tuple[str, ...]:
    """The beginnings of keys of submodules that load in their own way: what has another shape may fit them."""

    def is_own(one: nn.Module) -> bool:
        made_by = getattr(type(one)._load_from_state_dict, "__module__", "")
        return bool(one._load_state_dict_pre_hooks) or not made_by.startswith("torch.")

    if type(module).load_state_dict is not nn.Module.load_state_dict:
        return ("",)
    return tuple(f"{name}." if name else "" for name, one in module.named_modules() if is_own(one))


def _check_module(module: ModuleInterface, saved: Any, where: str, exempt: tuple[str, ...]) -> None:
    """See that a state dict fits before any of it is taken over.

    Args:
        exempt: The shape of what begins like one of these is seen to by the module itself.
    """
    if not isinstance(saved, dict):
        raise CheckpointMismatch(f"{where} holds no state dict of a module, but a {type(saved).__name__}")
    own = module.state_dict()
    problems = [f"it lacks {', '.join(_some(key for key in own if key not in saved))}"] if own.keys() - saved else []
    if saved.keys() - own.keys():
        problems.append(f"it has {', '.join(_some(key for key in saved if key not in own))}, which the module lacks")
    for key in _some(_misshapen({key: value for key, value in own.items() if not key.startswith(exempt)}, saved)):
        problems.append(key)
    if problems:
        changed = type(module).get_state is not ModuleInterface.get_state
        hint = "; get_state() is overridden, and so update_state(state) must be, to take it over" if changed else ""
        raise CheckpointMismatch(
            f"{where} does not fit {type(module).__name__}: {'; '.join(problems)}{hint}. Nothing was changed"
        )


def _misshapen(own: dict[str, Any], saved: dict[str, Any]) -> Iterator[str]:
    for key, tensor in own.items():
        there = saved.get(key)
        if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or key not in saved:
            continue
        if not isinstance(there, torch.Tensor):
            yield f"{key} is a {type(there).__name__} there and a tensor here"
        elif tensor.shape != there.shape:
            yield f"{key} has the shape {tuple(there.shape)} there and {tuple(tensor.shape)} here"


def _some(texts: Iterable[str], limit: int = 8) -> list[str]:
    shown = list(texts)
    return shown if len(shown) <= limit else [*shown[:limit], f"{len(shown) - limit} more"]
