"""Checkpoints of a run: copied at once, written while training goes on, and seen only when whole."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

import decovae
from decovae.errors import InputError, RunError
from decovae.process import lost_another
from decovae.runtime import LONGEST_WAIT, Runtime, raise_first
from decovae.training import checkpoint_files as files
from decovae.training.checkpoint_files import Damaged
from decovae.training.checkpoint_storage import Reader, Writer, ignore_warnings, last_line
from decovae.training.checkpoint_tensors import another_model, moments_of, new_moments, take_moments, weights_of
from decovae.training.ema import ExponentialMovingAverage, local_part

PATIENCE = 30.0
"""Seconds that a process of several which ends waits for its last checkpoint: the others may be gone."""


@dataclass(frozen=True)
class RunState:
    """What a run goes on from, beside its tensors. Learning rates and random states are functions of it."""

    step: int
    """Steps that are done."""
    position: int
    """Position in the order of samples."""
    skipped: int
    """Steps that were left out because something was not finite."""
    samples_per_step: int
    """Samples that all processes together take a step."""
    best: float | None
    """The best figure of the validations so far."""


@dataclass(frozen=True)
class Best:
    """By which figure of a validation one checkpoint is better than another."""

    metric: str
    higher: bool


class Checkpoints:
    """The folder ``checkpoints/`` of a run, its entries named ``step-00001000`` and so on.

    An entry holds weights, the optimisers' moments, moving averages and a `RunState`, in files with checksums. Tensors
    are stored as the processes hold them and can be read by another number of processes, sharded or not.

    `save` copies tensors to the CPU, into memory that it keeps, and returns; a thread writes them. It is a thread of
    our own around torch's ``save``, not ``async_save``: checksums, manifest and the rename have to follow in it before
    anybody may speak of a checkpoint, and it talks to the other processes through a group that only it uses.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        *,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        averages: Mapping[str, ExponentialMovingAverage],
        keep: int,
        keep_best: int,
        best: Best,
    ) -> None:
        self.folder = folder
        self.runtime = runtime
        self.modules = modules
        self.optimizers = optimizers
        self.averages = averages
        self.keep = keep
        self.keep_best = keep_best
        self.best = best
        # Never the group of the run: what the thread says there would come between what training says.
        group: Any = None if runtime.group is None else dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        self._background = replace(runtime, group=group)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: RunError | None = None
        ignore_warnings()

    @property
    def failure(self) -> RunError | None:
        """What writing ran into, as far as this process knows; never blocks."""
        return self._failure

    def save(self, state: RunState, figure: float | None) -> None:
        """Begin the entry for a step; every process calls this. The tensors may change as soon as it returns.

        Args:
            state: of the run after the step.
            figure: the validation's at this step, or None if there was none.

        Raises:
            RunError: if the entry before this one could not be written; on all processes.
        """
        self.wait()
        self._copy()
        manifest = {
            "step": state.step,
            "state": asdict(state),
            "world": self.runtime.world,
            "figure": None if figure is None else {"metric": self.best.metric, "value": figure},
            "networks": {
                name: sum(parameter.numel() for parameter in module.parameters())
                for name, module in self.modules.items()
            },
            "versions": {
                "decovae": decovae.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        # A daemon, since nothing may keep a process alive whose others are gone.
        self._thread = threading.Thread(target=self._write, args=(manifest,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when what was begun is published; every process calls this.

        Raises:
            RunError: if it could not be written; on all processes.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            failures = self.runtime.gather(self._failure)
            self._failure = next((failure for failure in failures if failure is not None), None)
        raise_first([self._failure])

    def close(self) -> None:
        """Let what was begun end, but do not wait for processes that may be gone."""
        if self._thread is not None:
            self._thread.join(None if self.runtime.world == 1 else PATIENCE)

    def resume(self, say: Callable[[str], None]) -> RunState | None:
        """Restore everything from the newest entry that is whole; None where there is none. Every process calls this.

        Args:
            say: told by the main process of each entry that is passed over.

        Raises:
            InputError: if there are entries and none is whole, or the newest whole one is another model's.
        """
        damage: list[str] = []
        for entry in self.runtime.on_main(self._begin):
            found = self._restored(entry)
            if isinstance(found, RunState):
                return found
            damage.append(f"{entry}: cannot be resumed from ({found})")
            if self.runtime.main:
                say(f"{damage[-1]}; trying the one before it.")
        if damage:
            advice = f"nor can any checkpoint before it; remove {self.folder} to begin the run again"
            raise_first([InputError(f"{damage[0]}, {advice}.")])
        return None

    def _begin(self) -> list[Path]:
        """The entries, newest first, once what killed processes left is gone."""
        try:
            files.clean(self.folder)
        except OSError as error:
            raise InputError(
                f"{self.folder}: cannot be cleaned up ({error.strerror}); give it to this user."
            ) from error
        return files.entries(self.folder)[::-1]

    @torch.no_grad()
    def _copy(self) -> None:
        """Bring the copies on the CPU up to date, page-locked where that makes them faster."""
        cuda = self.runtime.device.type == "cuda"
        # Weights first: sharded networks that hold gathered ones let go of them when asked.
        tensors = weights_of(self.modules, self.averages) | moments_of(self.modules, self.optimizers)
        self._copies = {
            name: self._copies[name] if name in self._copies else _room_for(tensor, page_locked=cuda)
            for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            local_part(self._copies[name]).copy_(local_part(tensor), non_blocking=cuda)
        if cuda:
            torch.cuda.current_stream(self.runtime.device).synchronize()

    def _write(self, manifest: dict[str, Any]) -> None:
        """Write the copies as an entry; in the thread, of every process."""
        entry = files.entry_of(self.folder, manifest["step"])
        try:
            if self.runtime.device.type == "cuda":
                torch.cuda.set_device(self.runtime.device)  # a thread begins on the first
            self._write_files(entry, manifest)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            self._failure = error if isinstance(error, RunError) else _unwritten(entry, error)

    def _write_files(self, entry: Path, manifest: dict[str, Any]) -> None:
        others, partial = self._background, entry.with_suffix(files.PARTIAL)
        others.on_main(lambda: files.make(partial))
        try:
            writer = Writer(partial)
            save(dict(self._copies), storage_writer=writer, process_group=others.group, no_dist=others.group is None)
            manifest["files"] = files.merged(others.gather(writer.written))

            def publish() -> None:
                files.publish(partial, entry, manifest)
                files.retire(
                    self.folder,
                    entry,
                    keep=self.keep,
                    keep_best=self.keep_best,
                    metric=self.best.metric,
                    higher=self.best.higher,
                )

            others.on_main(publish)
        except (Exception, CheckpointException):
            if self.runtime.main:
                files.drop(partial)
            raise

    def _restored(self, entry: Path) -> RunState | Damaged:
        """The state of an entry that everything was restored from, or why it cannot be."""
        try:
            return self._restore(entry)
        except Damaged as error:
            return error

    def _restore(self, entry: Path) -> RunState:
        """Restore everything from an entry.

        Raises:
            Damaged: if it is not whole.
            InputError: if it is another model's.
        """
        manifest = self.runtime.on_main(lambda: files.read_manifest(entry))
        self._check_files(entry, manifest["files"])
        try:
            state = RunState(**manifest["state"])
        except TypeError as error:
            raise Damaged(f"its {files.MANIFEST} is of another version: {error}") from error
        reader = Reader(entry)
        metadata = self.runtime.on_main(reader.read_metadata)
        targets = weights_of(self.modules, self.averages)
        if difference := another_model(metadata, targets, self.modules):
            advice = "give another --out, or the options that the run began with"
            raise_first([InputError(f"{entry}: is of another model, {difference}; {advice}.")])
        moments = new_moments(metadata, self.modules)
        group = self._background.group
        try:
            load({**targets, **moments}, storage_reader=reader, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise Damaged(last_line(error)) from error
        take_moments(moments, self.modules, self.optimizers)
        return state

    def _check_files(self, entry: Path, noted: dict[str, Any]) -> None:
        """Compare an entry's files with its manifest, each process some of them.

        Raises:
            Damaged: on all processes.
        """
        problem: Damaged | None = None
        mine = sorted(noted)[self.runtime.rank :: self.runtime.world]
        try:
            files.check_files(entry, {name: noted[name] for name in mine})
        except Damaged as error:
            problem = error
        raise_first(self.runtime.gather(problem))


def _room_for(tensor: Tensor, *, page_locked: bool) -> Tensor:
    """Memory on the CPU for a copy; ordinary memory, which is slower, where the system grants no other."""
    if page_locked:
        try:
            return torch.empty_like(tensor, device="cpu", pin_memory=True)
        except RuntimeError:
            pass
    return torch.empty_like(tensor, device="cpu")


def _unwritten(entry: Path, error: BaseException) -> RunError:
    """The error for the user, with what the file system said where it was that."""
    causes = [error]
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
    reasons = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    reason = reasons[0] if reasons else lost_another(causes[0]) or last_line(causes[0])
    return RunError(f"{entry}: cannot be written ({reason}); earlier checkpoints are kept.")
