"""A checkpoint in memory: read, verified, and restored into the module and the callbacks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from events.checkpoint.files import read_file, read_manifest
from events.checkpoint.manifest import MANIFEST_NAME, SHARDED_FORMAT, STATE_NAME, TENSORS_NAME, Manifest
from events.checkpoint.shards import rank_of_outputs, state_name
from events.checkpoint.weights import first_of
from events.errors import CheckpointDamaged, CheckpointMismatch
from events.log import logger
from trainer.checkpoint.fit import check_fits, own_loading_prefixes, takes_state_by_default
from trainer.checkpoint.position import RANK_FIELDS, SAVED_FIELDS, Position, SavedCallback, SavedState
from trainer.data.rng import RngState
from trainer.data.tensor_state import put_together
from trainer.data.tensors import clone_tensors
from trainer.distributed.local import is_split
from trainer.distributed.sharding import seed_for
from trainer.hooks.hooks import CallbackHooks
from trainer.module_interface import ModuleInterface


def _is_late(name: str) -> bool:
    """Whether a tensor is read once the optimizers exist."""
    return name.startswith("optimizers.")


class Loaded:
    """A checkpoint, read and verified, with its tensors on the host. Waits for the disk.

    If the module or the checkpoint is divided among ranks, a rank reads and verifies only the files that it needs, and
    its tensors are divided as the module's; those of optimizers are read by `read_optimizers`.

    Args:
        module: The one to restore, if its parameters may be split; its tensors have a place already.
        rank: The one of this process.
        ranks: Of this run.

    Raises:
        CheckpointDamaged: The checkpoint is incomplete or changed.
        CheckpointTooNew: A later version wrote it.
    """

    def __init__(self, folder: Path, module: ModuleInterface | None = None, rank: int = 0, ranks: int = 1) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._reader: Any = None
        self._state = self._file(STATE_NAME)
        if self.manifest.format >= SHARDED_FORMAT or (module is not None and any(map(is_split, module.parameters()))):
            self._sharded: Any = importlib.import_module("trainer.checkpoint.sharded")
            self._reader = self._sharded.StagecastReader(folder, self.manifest)
            layout = self._sharded.layout_of(module) if module is not None else {}.get
            self.state: dict[str, Any] = self._reader.decode(self._state, layout, lambda name: not _is_late(name))
        else:
            self.state = self._joined(self._state, TENSORS_NAME)
        others = {name for name in self.manifest.files if name.startswith("rank-") and name != state_name(rank)}
        of_outputs = {name: rank_of_outputs(name) for name in self.manifest.files}
        self.has_outputs = any(one is not None for one in of_outputs.values())
        """Whether a rank has stored the outputs that it had kept for the end of the epoch."""
        others |= {name for name, one in of_outputs.items() if one is not None and one % ranks != rank}
        self.parts = {
            name.removesuffix(".msgpack"): self._part(name)
            for name in self.manifest.files
            if name.endswith(".msgpack") and name != STATE_NAME and name not in others
        }
        try:
            msgspec.convert(self.state, SavedState)
            msgspec.convert(self._callback_parts, list[SavedCallback])
        except msgspec.ValidationError as error:
            raise CheckpointDamaged(f"{self.folder / STATE_NAME} is not the state of a run: {error}") from error

    def _file(self, name: str) -> memoryview:
        if name not in self.manifest.files:
            raise CheckpointDamaged(f"{self.folder / MANIFEST_NAME} does not list {name}")
        return read_file(self.folder, name, self.manifest.files[name])

    def _joined(self, state: memoryview, tensors_name: str) -> Any:
        tensors = self._file(tensors_name) if tensors_name in self.manifest.files else None
        return put_together(state, tensors, str(self.folder / tensors_name))

    def _part(self, name: str) -> Any:
        state = self._file(name)
        if name.startswith("rank-") and self.manifest.format >= SHARDED_FORMAT:  # its tensors are beside its shards
            return self._reader.decode(state, {}.get)
        return self._joined(state, name.removesuffix(".msgpack") + ".safetensors")

    @property
    def _callback_parts(self) -> list[dict[str, Any]]:
        return [part for name, part in self.parts.items() if name.startswith("callback-")]

    @property
    def position(self) -> Position:
        """Position of the loop."""
        saved = self._kept("position")
        return Position(**{name: saved[name] for name in SAVED_FIELDS if name in saved})

    @property
    def rng(self) -> RngState:
        """States of the random generators."""
        rng: RngState = self._kept("rng")
        return rng

    @property
    def global_step(self) -> int:
        """Number of finished steps."""
        return int(self.state["global_step"])

    @property
    def epoch(self) -> int:
        """The current epoch, or the next one between two."""
        return int(self.state["epoch"])

    def become(self, rank: int, world_size: int, fresh_rng: Callable[[int], RngState]) -> None:
        """Replace what is rank 0's own by another rank's. After `restore_module`, on every rank of a run.

        Args:
            fresh_rng: Returns the random generators for a seed, for a rank that the checkpoint does not know.

        Raises:
            CheckpointMismatch: The dataloader's own state belongs to another number of ranks.
        """
        ranks = {name: self.parts.pop(name) for name in list(self.parts) if name.startswith("rank-")}
        position = self.state["position"]
        before = position.get("world_size", 1)
        if before == world_size:
            own = ranks.get(f"rank-{rank}") if rank else None
            if own is not None:  # None, too, where that rank had not sent its own in time
                self.state["rng"] = own["rng"]
                position.update(own["position"])
                self.state["metrics"]["objects"] = own["objects"]
            if own is not None or not rank:
                return
        if position["loader_state"] is not None and before != world_size:
            raise CheckpointMismatch(
                f"{self.folder} holds the dataloader's own state for {before} ranks, which does not fit {world_size};"
                f" resume with {before}, or from a checkpoint without it"
            )
        if rank:
            position.update(dict.fromkeys(RANK_FIELDS))
            self.state["metrics"].pop("objects", None)  # those of rank 0 hold what it has seen
            self.state["rng"] = fresh_rng(seed_for(position["sampler_seed"], rank, self.global_step))

    @property
    def outputs(self) -> dict[int, Any]:
        """The outputs of the epoch that ranks of the checkpoint's run had kept, by rank: those that this one adopts."""
        found = {rank_of_outputs(name): part for name, part in self.parts.items()}
        return {rank: part for rank, part in found.items() if rank is not None}

    def _kept(self, name: str) -> Any:
        """Return a copy of an entry of the state: an original tensor would keep the whole file in memory."""
        return clone_tensors(self.state[name])

    def forget(self) -> None:
        """Release all state that has been restored; keep the entries that the loop reads later."""
        self.state = {name: self._kept(name) for name in ("global_step", "epoch", "position", "rng")}
        self.parts = {name: part for name, part in self.parts.items() if rank_of_outputs(name) is not None}
        self._reader, self._state = None, memoryview(b"")

    def restore_module(self, module: ModuleInterface, *, averaged: bool | None = False) -> None:
        """Restore the module's state.

        Args:
            averaged: The averaged weights instead of the trained ones; None: if they are what the run has validated.

        Raises:
            CheckpointMismatch: The state is of another model; names keys and shapes. The module is unchanged, unless a
                submodule with its own loading refused.
        """
        state, by_default = self.module_state(averaged), takes_state_by_default(module)
        own = own_loading_prefixes(module) if by_default else ()
        if by_default:
            check_fits(module, state, str(self.folder), own)
            if self._reader is not None:
                state = self._sharded.split_as(module, state)
        if own or not by_default:
            state = clone_tensors(state)  # the module may keep them, and with them the memory of the whole file
        try:
            module.update_state(state)
        except RuntimeError as error:
            if not own:
                raise
            raise CheckpointMismatch(
                f"the checkpoint {self.folder} does not fit {type(module).__name__}, part of which may have taken it"
                f" over: {error}"
            ) from error

    def module_state(self, averaged: bool | None) -> Any:
        """Return the module's state, which shares the memory of the file; ``averaged`` as in `restore_module`."""
        saved = self.state.get("averaged")
        if saved is None and averaged:
            logger.warning(f"the checkpoint {self.folder} has no averaged weights, so its trained weights are used")
        if saved is None or not (saved["validated"] if averaged is None else averaged):
            return self.state["module"]
        if saved["stale"]:
            logger.warning(f"the batch norm statistics of the average in {self.folder} are those of an earlier average")
        return saved["module"]

    def restore_frozen(self, module: ModuleInterface) -> None:
        """Restore ``requires_grad`` of the module's parameters."""
        frozen, again = set(self.state["frozen"]), []
        for name, parameter in module.named_parameters():
            if parameter.is_floating_point() or parameter.is_complex():  # other types have no gradient
                if parameter.requires_grad and name in frozen:
                    again.append(name)
                parameter.requires_grad_(name not in frozen)
        if again:
            logger.warning(
                f"requires_grad of {', '.join(first_of(again))} is False again, as in the checkpoint {self.folder}; set"
                f" it in get_optimizers_schedulers() or on_begin_train_epoch() to train them"
            )

    def read_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Read the state of optimizers, split as their parameters are, if it has not been read yet. Waits for the disk.

        Raises:
            CheckpointDamaged: As the constructor.
        """
        if self._reader is not None:
            layout = self._sharded.layout_of_optimizers(optimizers, self.state["optimizers"])
            self.state["optimizers"] = self._reader.decode(self._state, layout, _is_late)["optimizers"]

    @property
    def optimization(self) -> dict[str, object]:
        """The state of optimizers and schedulers."""
        # Copies: torch would keep the tensors, and with them the memory of the whole file.
        return {name: self._kept(name) for name in ("optimizers", "schedulers", "kinds")}

    def restore_callbacks(
        self, callbacks: Iterable[CallbackHooks], on_failed_hook: Callable[[CallbackHooks, str, Exception], None]
    ) -> None:
        """Restore the states of callbacks, by their ``state_key``.

        A callback without its own key whose arguments have changed takes the only remaining state of its class, with a
        warning.

        Args:
            on_failed_hook: Handles an exception of ``load_state_dict`` by the callback's policy.

        Raises:
            CheckpointMismatch: Several states of one class remain, so that their owners are unknown.
        """
        saved = {one["key"]: one for one in [*self.state["callbacks"], *self._callback_parts]}
        found: list[tuple[CallbackHooks, dict[str, object]]] = []
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
                    f"{self.folder} has the states of {', '.join(one['key'] for one in alike)}, none of which is"
                    f" certainly that of {callback.state_key}; give it the state_key that it had"
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
                f"the checkpoint {self.folder} has state for callbacks that the run does not have: {', '.join(saved)}"
            )
