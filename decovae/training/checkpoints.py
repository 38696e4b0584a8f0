"""Checkpoints of a run: written beside their place and renamed into it, so that none is ever seen half-written."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from decovae.errors import InputError, RunError
from decovae.runtime import Runtime
from decovae.training.ema import ExponentialMovingAverage


class Checkpoints:
    """The folder ``checkpoints/`` of a run, its newest entries named ``step-00001000`` and so on.

    An entry holds weights, optimiser states, moving averages, the step and the position in the order of samples. The
    learning rate and the random state are functions of the step (see :mod:`decovae.training.schedule`).
    Tensors are stored as the processes hold them and can be read by another number of processes.
    """

    def __init__(
        self,
        folder: Path,
        runtime: Runtime,
        *,
        modules: dict[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        averages: dict[str, ExponentialMovingAverage],
        keep: int,
    ) -> None:
        self.folder = folder
        self.runtime = runtime
        self.modules = modules
        self.optimizers = optimizers
        self.averages = averages
        self.keep = keep

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0, "position": 0}
        for name, module in self.modules.items():
            optimizer = self.optimizers[name]
            untouched = not optimizer.state
            weights, moments = get_state_dict(module, optimizer)
            if untouched:
                # To have a state to show, torch made a step at learning rate 0, which a real first step must not count.
                for parameter_state in optimizer.state.values():
                    parameter_state["step"].zero_()
            state[name] = {"weights": weights, "optimizer": moments}
            if name in self.averages:
                state[name]["average"] = self.averages[name].averages
        return state

    def newest(self) -> Path | None:
        """The entry of the most steps, or None."""
        entries = sorted(self.folder.glob("step-????????"))
        return entries[-1] if entries else None

    def save(self, step: int, position: int) -> None:
        """Write the entry for ``step``, then drop the oldest beyond ``keep``; every process calls this."""
        entry = self.folder / f"step-{step:08d}"
        partial = entry.with_suffix(".partial")
        self.runtime.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what is meant: a run of one process
            try:
                save({**self._state(), "step": step, "position": position}, checkpoint_id=partial)
            except (OSError, CheckpointException) as error:
                raise RunError(
                    f"{entry}: cannot be written ({_last_line(error)}); earlier checkpoints are kept."
                ) from error

        def publish() -> None:
            shutil.rmtree(entry, ignore_errors=True)
            partial.rename(entry)
            for old in sorted(self.folder.glob("step-????????"))[: -self.keep]:
                shutil.rmtree(old)

        self.runtime.on_main(publish)

    def load(self, entry: Path) -> tuple[int, int]:
        """Restore everything from an entry; its step and position. Every process calls this.

        Raises:
            InputError: if the entry cannot be read or belongs to another model.
        """
        state = self._state()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(state, checkpoint_id=entry)
        except (Exception, CheckpointException) as error:  # the latter is no Exception; nothing else is common
            raise InputError(
                f"{entry}: cannot be resumed from ({_last_line(error)}); remove it to go on from the one before it."
            ) from error
        for name, module in self.modules.items():
            set_state_dict(
                module,
                self.optimizers[name],
                model_state_dict=state[name]["weights"],
                optim_state_dict=state[name]["optimizer"],
            )
            if name in self.averages:
                self.averages[name].averages = state[name]["average"]
        return state["step"], state["position"]


def _last_line(error: BaseException) -> str:
    """The last line of an error's text, where storage and planner put the cause below a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
