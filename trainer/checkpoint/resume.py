"""Chooses the checkpoint that a run resumes from, or takes its weights from."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from events.checkpoint.lineage import AttemptNote, ranked
from events.checkpoint.manifest import MANIFEST_NAME, CheckpointName
from events.checkpoint.settings import Checkpoints
from events.checkpoint.store import CHECKPOINTS_DIR, CheckpointStore
from events.checkpoint.weights import first_of
from events.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointNotFound
from events.log import logger
from events.masking import masked
from events.safe_files import UnsafeFile
from trainer.checkpoint.fetch import KEYWORDS, no_name
from trainer.checkpoint.fit import own_loading_prefixes, takes_state_by_default
from trainer.checkpoint.init_from import InitFrom
from trainer.checkpoint.loaded import Loaded
from trainer.checkpoint.warm_start import file_of_weights, flattened, read_state, take
from trainer.distributed.local import is_split
from trainer.module_interface import ModuleInterface

OnRejected = Callable[[str, Exception], None]
Read = Callable[[Path], Loaded]
Search = Callable[[Read], Loaded | None]


def read_alone(search: Search) -> Loaded | None:
    """Return the checkpoint that a search finds, which a single process reads."""
    return search(Loaded)


class CheckpointPlan:
    """The checkpoints of one run: settings, stores, and the one to resume from.

    Args:
        settings: None disables checkpoints.
        store: Of this run; None without a run folder.
        resume: The trainer's argument.
        init_from: The trainer's argument: weights for a run that does not resume.
        url: Upload URL of this run's checkpoints; None without uploads.
        run_id: Of this run; checkpoints of another run are used only if the user names them.
    """

    def __init__(
        self,
        settings: Checkpoints | None,
        store: CheckpointStore | None,
        resume: str | os.PathLike[str] | None,
        url: str | None,
        init_from: InitFrom | None = None,
        run_id: str | None = None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.url = url
        self._resume = resume
        self._init_from = init_from
        self._run_id = run_id

    def check(self) -> None:
        """Check that the user's paths exist, before the run starts.

        Raises:
            CheckpointNotFound: A path does not exist. A started attempt would end a finished run as failed.
        """
        resume, store = self._resume, self.store
        if resume is not None and resume not in KEYWORDS:
            _check_place("resume", resume, store)
        found = store is not None and resume == "auto" and (store.source is not None or any(store.candidates()))
        if self._init_from is not None and not found:
            _check_place("init_from", self._init_from.path, None)

    def load(self, on_rejected: OnRejected, read: Read = Loaded) -> Loaded | None:
        """Read the checkpoint to resume from; None for a new run. Waits for the disk.

        Args:
            on_rejected: Called with name and error of each invalid checkpoint, before an older one is tried.
            read: Reads the checkpoint in a folder.

        Raises:
            CheckpointError: ``resume`` names no checkpoint, or one that cannot be used.
        """
        resume, store = self._resume, self.store
        if resume is None:
            return None
        if self._init_from is not None and resume != "auto":
            logger.warning(f"init_from={self._init_from.path!r} is ignored; resume={os.fspath(resume)!r} is given")
        if resume not in KEYWORDS:
            return find(resume, store, on_rejected, read=read)
        if store is None:
            raise CheckpointNotFound(f"resume={resume!r} needs a run folder; give run_dir")
        if resume == "best":
            return self._load_best(store, on_rejected, read)
        loaded = load_from(store, on_rejected, self._run_id, read=read)
        if loaded is None and (source := store.source) is not None:
            loaded = find(source, store, on_rejected, read=read)
        return loaded

    def name_of(self, loaded: Loaded) -> str | None:
        """Return the name of a checkpoint of this run; None for one of another run."""
        if self.store is None:
            return None
        own = self.store.folder.resolve()
        if own not in (loaded.folder.resolve().parent, loaded.folder.absolute().parent.resolve()):
            return None
        return str(loaded.manifest.name)

    def _load_best(self, store: CheckpointStore, on_rejected: OnRejected, read: Read) -> Loaded:
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
                return read(store.path(name))
            except (CheckpointDamaged, CheckpointMismatch, CheckpointNotFound) as error:
                reject(str(name), error)
        what = f"with the metric {monitor!r}" if monitor else "with a metric"
        raise CheckpointNotFound(
            f"resume='best': {store.folder} has no valid checkpoint {what} (it has: {_contents(store)}); give the path"
            f" of one, or train with Checkpoints(best=...)"
        )

    def replaces_all(self, module: ModuleInterface) -> bool:
        """Whether every entry of the module's state dict is certain to be read, so that no initial value counts."""
        init = self._init_from
        is_certain = self._resume not in (None, "auto") or (init is not None and init.strict)
        return is_certain and takes_state_by_default(module) and not own_loading_prefixes(module)

    def load_weights(self, module: ModuleInterface, agree: Callable[[Search], Loaded | None] = read_alone) -> bool:
        """Load the weights of ``init_from``; return False without ``init_from``. Waits for the disk.

        Args:
            agree: Returns the checkpoint that a search finds and every rank of the run can read.

        Raises:
            CheckpointMismatch: The weights are of another model; names keys and shapes. The module is unchanged.
            CheckpointError: The weights do not exist, or cannot be read.
        """
        init = self._init_from
        if init is None:
            return False
        named = Path(init.path)
        if (file := file_of_weights(named)) is not None:
            # A rank of several reads its part only.
            take(module, read_state(file, named, maps=any(map(is_split, module.parameters()))), init, str(file))
            return True

        def warn(name: str, error: Exception) -> None:
            logger.warning(f"{error}; an older checkpoint is tried")

        place = named.parent if named.is_file() else named
        loaded = agree(lambda read: find(place, None, warn, "init_from", read=read))
        assert loaded is not None
        if not init.strict or init.rename:
            take(module, dict(flattened(loaded.module_state(None))), init, str(loaded.folder))
        elif takes_state_by_default(module):
            take(module, loaded.module_state(None), init, str(loaded.folder))
        else:
            loaded.restore_module(module, averaged=None)
        return True

    def scores_up_to(self, loaded: Loaded) -> dict[int, float]:
        """Return the monitored metrics of the existing checkpoints up to this one, by step."""
        settings, store = self.settings, self.store
        if settings is None or settings.best is None or store is None or self.name_of(loaded) is None:
            return {}
        scores = reversed(
            store.scores(settings.best, run_id=loaded.manifest.run_id).items()
        )  # the newest of a step is last
        return {name.step: score.value for name, score in scores if name <= loaded.manifest.name}

    @property
    def resumes(self) -> bool:
        """Whether ``resume`` was given."""
        return self._resume is not None

    def prepare(self, attempt: int, loaded: Loaded | None) -> None:
        """Write the note of an attempt. Waits for the disk. Raises `CheckpointError`."""
        if self.settings is None or self.store is None:
            return
        parent = self.name_of(loaded) if loaded is not None else None
        source = os.path.abspath(loaded.folder) if loaded is not None and parent is None else None
        if parent is None and self.store.names():
            logger.warning(
                f"attempt {attempt} resumes from no checkpoint in {self.store.folder}, and supersedes all of them"
            )
        try:
            self.store.prepare(AttemptNote(attempt, parent, source, secrets.token_hex(8)))
        except UnsafeFile as error:
            raise CheckpointError(
                f"no checkpoint can be written to {self.store.folder}: {error}; remove that, or set another run_dir"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"no checkpoint can be written to {self.store.folder}: {error}; set run_dir to a writable folder on a"
                f" disk with room, or train with checkpoints=False"
            ) from error


def load_from(
    store: CheckpointStore, on_rejected: OnRejected, run_id: str | None = None, *, read: Read = Loaded
) -> Loaded | None:
    """Read the newest valid checkpoint of a store; None for an empty store.

    Args:
        on_rejected: Called with the error of each invalid checkpoint, each one of another run, and each damaged note.
        run_id: Only checkpoints of this run; None for any.

    Raises:
        CheckpointDamaged: All checkpoints are damaged.
        CheckpointTooNew: A later version wrote the newest one.
    """
    tried: list[str] = []
    for note, damage in store.damaged_notes().items():
        on_rejected(note, damage)
    for name in store.candidates():
        try:
            check_owner(store, name, run_id)
            return read(store.path(name))
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
    """Check that a checkpoint belongs to a run; None for any.

    Raises:
        CheckpointMismatch: It belongs to another run, for example because it was copied into the folder.
        CheckpointError: As `Lineage.manifest`.
    """
    if run_id is not None and (owner := store.manifest(name).run_id) != run_id:
        raise CheckpointMismatch(
            f"{store.path(name)} belongs to run {owner!r:.200}, not to {run_id!r:.200}; to resume from it, give its"
            f" path as resume"
        )


def find(
    path: str | os.PathLike[str],
    store: CheckpointStore | None,
    on_rejected: OnRejected,
    argument: str = "resume",
    *,
    read: Read = Loaded,
) -> Loaded:
    """Read the checkpoint at a path, or the newest one of a run folder. Waits for the disk.

    Args:
        store: Of this run, in which a name without a folder (``step-500.a1``) is looked up.
        argument: The trainer's argument with the path, for messages.

    Raises:
        CheckpointError: The checkpoint does not exist, or cannot be read.
    """
    try:
        folder = _folder_of(path, store)
        if (folder / MANIFEST_NAME).is_file() or CheckpointName.parse(folder.name) is not None:
            return read(folder)
        for stored in (folder / CHECKPOINTS_DIR, folder):
            if (loaded := load_from(CheckpointStore(stored), on_rejected, read=read)) is not None:
                return loaded
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointNotFound(f"{argument}={os.fspath(path)!r:.200} cannot be read: {error}") from error
    raise _not_found(path, argument)


def _folder_of(path: str | os.PathLike[str], store: CheckpointStore | None) -> Path:
    """Return the folder of a path, or of the name of a checkpoint of this run."""
    folder = Path(path)
    name = CheckpointName.parse(os.fspath(path))
    if name is not None and store is not None and not folder.exists():
        folder = store.path(name)
    return folder


def _check_place(argument: str, path: str | os.PathLike[str], store: CheckpointStore | None) -> None:
    """Check that a path exists. Raises `CheckpointNotFound`."""
    try:
        _folder_of(path, store).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise _not_found(path, argument) from None
    except (OSError, ValueError):
        pass  # reading it raises a better error


def _not_found(path: str | os.PathLike[str], argument: str) -> CheckpointNotFound:
    text = os.fspath(path)
    if (word := no_name(text)) is not None:
        wrong = f"{word!r} is not a checkpoint name (expected e.g. step-500.a1)"
    else:
        wrong = "there is no checkpoint"
    above = Path(text).parent
    if (names := CheckpointStore(above).names()) and above.name == CHECKPOINTS_DIR:
        wrong += f"; {above} holds {', '.join(first_of(map(str, names)))}"
    if argument == "init_from" and (files := sorted(Path(text).glob("*.safetensors"))):
        wrong += f"; it has {', '.join(first_of(file.name for file in files))}"
    fix = "or 'auto' or 'best'" if argument == "resume" else "or a safetensors file"
    return CheckpointNotFound(
        f"{argument}={masked(text)!r}: {wrong}; give the folder of a checkpoint or of a run, {fix}"
    )


def _contents(store: CheckpointStore) -> str:
    """Describe a store's checkpoints with their metrics, for a message."""
    shown = []
    for name in store.names():
        try:
            metric = store.manifest(name).metric
        except CheckpointError:
            shown.append(f"{name} (unreadable)")
        else:
            shown.append(str(name) if metric is None else f"{name} ({metric.name} {metric.value:.6g})")
    return ", ".join(first_of(shown)) or "none"
