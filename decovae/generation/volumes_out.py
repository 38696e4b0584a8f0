"""Samples as files: a NIfTI volume where the source volumes lie, and a sidecar that says that it is synthetic."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

import decovae
from decovae.data.frame import Frame
from decovae.data.resample import resample_crop
from decovae.data.template import cohort_affine
from decovae.errors import InputError
from decovae.files import write_atomically, write_text

NOTICE = "This volume is synthetic: a generative model made it. It is no scan of a person and no basis for a diagnosis."

VOLUME_SUFFIX, SIDECAR_SUFFIX = ".nii.gz", ".json"

DESCRIPTION_BYTES = 79
"""Room in a NIfTI-1 header's description, without its closing zero."""

MNI, ALIGNED = 4, 2
"""NIfTI's codes for coordinates of the MNI-152 template, and for those of some other image."""

COMPRESSION = 1  # the mantissas of floats hardly compress: level 9 takes twice as long for 2 %


def to_frame(image: Tensor, frame: Frame) -> np.ndarray:
    """The image in the voxels of the source volumes: the inverse of the resize in `decovae.data.patches.load_volume`.

    What the preparation averaged away does not come back; what is as smooth as the grid can hold does.

    Args:
        image: (1, D, H, W), floating point, on any device.
        frame: of the source volumes.

    Returns:
        `frame.shape`, float32, on the scale that networks see: 0 to about 1. Negative intensities, which decoders put
        out around 0 and no scanner does, are set to 0.
    """
    volume = image[0].float().cpu().numpy()
    return resample_crop(volume, grid=frame.shape, corner=(0, 0, 0), size=frame.shape).clamp(min=0).numpy()


def nifti_bytes(volume: np.ndarray, frame: Frame, *, label: str, kind: str = "synthetic") -> bytes:
    """A compressed NIfTI-1 file, the same bytes for the same arguments.

    Its description begins with what kind of volume it is. Its coordinates are called MNI-152 where its affine is that
    of the template's box (UK Biobank's), otherwise aligned to another image.

    Args:
        volume: `frame.shape`, float32.
        frame: of the volume.
        label: which sample it is, for the description, which is cut after 79 bytes.
        kind: what it is, unless it is synthetic.
    """
    import nibabel as nib
    from nibabel.spatialimages import HeaderDataError

    affine = frame.matrix
    code = MNI if np.allclose(affine, cohort_affine(frame.shape), atol=1e-3) else ALIGNED
    image = nib.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code)
    try:
        image.set_qform(affine, code, strip_shears=False)
    except HeaderDataError:  # a quaternion holds no shears
        image.set_qform(None, 0)
    description = f"{kind}: DeCo-VAE {decovae.__version__} {label}".encode()
    image.header["descrip"] = description[:DESCRIPTION_BYTES].decode(errors="ignore").encode()
    return gzip.compress(image.to_bytes(), COMPRESSION, mtime=0)


def write_sample(image: Tensor, frame: Frame, folder: Path, name: str, *, label: str, facts: Mapping[str, Any]) -> None:
    """Write ``NAME.nii.gz`` and then ``NAME.json``, each whole or not at all: a sidecar means that both are there.

    Args:
        image: (1, D, H, W), floating point, on any device.
        frame: of the source volumes.
        folder: is made where there is none.
        name: of the files, without suffix.
        label: for the header's description.
        facts: what the sidecar says besides that the volume is synthetic, in JSON's types.

    Raises:
        OSError: a file cannot be written.
    """
    content = nifti_bytes(to_frame(image, frame), frame, label=label)
    write_atomically(folder / (name + VOLUME_SUFFIX), lambda file: file.write(content))
    write_json(folder / (name + SIDECAR_SUFFIX), {"synthetic": True, "notice": NOTICE, **facts})


def is_written(folder: Path, name: str) -> bool:
    """Whether `write_sample` has finished this sample."""
    return (folder / (name + SIDECAR_SUFFIX)).is_file() and (folder / (name + VOLUME_SUFFIX)).is_file()


def read_volume(folder: Path, name: str) -> np.ndarray:
    """The voxels of a sample that was written, `(D, H, W)`, float32.

    Raises:
        InputError: the file is missing or damaged.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    path = folder / (name + VOLUME_SUFFIX)
    try:
        return np.asarray(nib.load(path).dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        raise InputError(f"{path}: is damaged; remove it and run the same command again.") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
