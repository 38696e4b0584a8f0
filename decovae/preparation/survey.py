"""What a preparation was pointed at: every file that is or should be a volume, as a candidate or with what is wrong."""

from __future__ import annotations

from pathlib import Path

from decovae.data.file_bytes import printable
from decovae.data.manifest import MANIFESTS
from decovae.data.openable import is_there
from decovae.data.walk import walk
from decovae.errors import InputError
from decovae.preparation.bids import survey_bids
from decovae.preparation.listed import survey_manifest
from decovae.preparation.selection import Selection, Survey, SurveyOptions, passed_by

__all__ = ["Survey", "SurveyOptions", "survey"]


def survey(root: Path, options: SurveyOptions, *, masks: bool = True) -> Survey:
    """The volumes of a folder, of a BIDS dataset (a folder with `dataset_description.json`) or of a manifest.

    In a folder, everything below it that looks like a volume counts: .nii and .nii.gz files and .hdr/.img pairs are
    candidates; links to nothing, pipes, unreadable folders, lone halves of pairs and volumes in other formats are
    exclusions. No file is opened.

    Args:
        root: the folder, or a .csv or .tsv file with a column `path`.
        masks: look for the masks that a manifest names; else they are nobody's.

    Raises:
        InputError: nothing at `root`, a manifest or a BIDS table that cannot be read, or an option without a meaning.
    """
    selection = Selection(options)
    try:
        if root.is_dir():
            if options.source_root is not None:
                raise InputError("A source root is for manifests: a folder's own paths are relative to it.")
            if is_there(root / "dataset_description.json"):
                return survey_bids(root, options.suffix, selection)
            return _survey_folder(root, selection)
        if root.is_file() and root.suffix.lower() in MANIFESTS:
            return survey_manifest(root, options.source_root, selection, masks=masks)
        if not is_there(root):
            raise InputError(f"{root} does not exist: give a folder of volumes, a BIDS dataset or a CSV manifest.")
    except OSError as error:
        raise InputError(f"{printable(root)} cannot be read ({error.strerror}).") from error
    raise InputError(f"{root} is neither a folder nor a manifest: a .csv or .tsv file with a column 'path'.")


def _survey_folder(root: Path, selection: Selection) -> Survey:
    found = walk(root)
    taken = (selection.take(root, entry) for entry in found.entries if selection.wants(entry))
    return selection.survey(taken, passed_by(found))
