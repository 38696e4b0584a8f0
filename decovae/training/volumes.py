"""The volumes of a run: opened, and split."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from decovae.data.cohort import open_cohort
from decovae.data.nifti import open_nifti
from decovae.data.patches import split_subjects
from decovae.data.splits import declared_splits, key_of
from decovae.data.store import StoreVolumes, is_store, open_store
from decovae.data.volumes import Volumes, times
from decovae.errors import InputError
from decovae.runtime import Runtime
from decovae.training.config import DataConfig
from decovae.training.finished import FinishedVAE
from decovae.training.run_folder import read_inputs

COHORT = "template cohort (simulated from the MNI-152 template; no subject is real)"


def describe(data: DataConfig) -> str:
    """What the volumes are, for whoever reads a result: their folder's name, for its path is nobody else's business."""
    return COHORT if data.root is None else data.root.name


def open_volumes(data: DataConfig) -> Volumes:
    """The volumes that ``--data.root`` names, or the template cohort, all of them checked.

    Those of a store were checked when it was prepared; its files are looked at when they are read.

    Raises:
        InputError: if there are none, or one cannot be used.
    """
    if data.root is None:
        return open_cohort(data.cohort_size, seed=data.seed, shape=data.cohort_shape)
    if not is_store(data.root):
        return open_nifti(data.root, patch=data.patch)
    store = open_store(data.root)
    if any(size < least for size, least in zip(store.grid, data.patch, strict=True)):
        raise InputError(
            f"The store {data.root} holds volumes of {times(store.grid)} voxels, smaller than the patch "
            f"{times(data.patch)}; prepare one with larger volumes, or lower --data.patch."
        )
    return store


def inputs_of(volumes: Volumes) -> dict[str, str]:
    """What a run notes of its volumes to know them again: a store's checksum; nothing of files or of the cohort."""
    return {"store": volumes.checksum} if isinstance(volumes, StoreVolumes) else {}


def check_unchanged(volumes: Volumes, data: DataConfig, run: FinishedVAE) -> None:
    """Refuse what lies where a run's volumes were and is not what it was trained on: those whom it was trained on could
    be taken for held out. Volumes from elsewhere are what somebody asked for.

    Args:
        volumes: those that are used now.
        data: where they are from.
        run: the one that was trained.

    Raises:
        InputError: the store there is another one, or was none.
    """
    theirs, before = run.config.data.root, read_inputs(run.folder)
    if before is None or data.root is None or theirs is None or data.root.resolve() != theirs.resolve():
        return
    if before.get("store") != inputs_of(volumes).get("store"):
        raise InputError(
            f"{data.root}: holds other volumes, or another split of them, than {run.folder} was trained on, so that "
            "subjects of its training could be taken for held out; prepare them there as they were, or train again."
        )


def volumes_of(run: FinishedVAE, runtime: Runtime) -> Volumes:
    """The volumes that a finished run was trained on; every process calls this.

    Raises:
        InputError: they cannot be had, or are others now.
    """
    data = run.config.data
    runtime.fill_caches(lambda: open_volumes(data))
    volumes = open_volumes(data)
    runtime.on_main(lambda: check_unchanged(volumes, data, run))
    announce(remarks(volumes, data), runtime)
    return volumes


def remarks(volumes: Volumes, data: DataConfig) -> list[str]:
    """Sentences on what a person might not expect of the volumes."""
    if isinstance(volumes, StoreVolumes) and volumes.grid != data.grid:
        return [
            f"note: the store {volumes.folder} holds volumes of {times(volumes.grid)} voxels, which are resized to "
            f"--data.grid {times(data.grid)} at every reading; a store prepared for that grid is faster and sharper."
        ]
    return []


def announce(notes: Iterable[str], runtime: Runtime) -> None:
    """Print notes, once for all processes."""
    for note in notes if runtime.main else ():
        print(note, file=sys.stderr)


def split(volumes: Volumes, data: DataConfig) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation volumes.

    Where the volumes have a column ``split``, it says so, and volumes for testing are in neither; if it names nobody
    for validation, those are held out from the subjects for training, as they are from all where there is no column.

    Raises:
        InputError: if no subject would be left for training, or the column makes no sense.
    """
    declared = declared_splits((record.subject, record.columns) for record in volumes.records)
    everyone = range(len(volumes.records))
    training = everyone if declared is None else [index for index in everyone if declared[index] == "train"]
    if not training:
        raise InputError(f"{describe(data)}: its column 'split' leaves no volume for training; write train for some.")
    if declared is not None and "validation" in declared:
        return list(training), [index for index in everyone if declared[index] == "validation"]
    subjects = [volumes.records[index].subject for index in training]
    held_out = min(data.validation_limit, max(1, round(data.validation_fraction * len(set(map(key_of, subjects))))))
    kept, validation = split_subjects(subjects, validation=held_out, seed=data.seed)
    return [training[place] for place in kept], [training[place] for place in validation]
