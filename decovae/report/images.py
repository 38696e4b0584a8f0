"""Volumes and pictures of them, as the page embeds them."""

from __future__ import annotations

import base64
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from decovae.data.frame import Frame
from decovae.data.volumes import affine_rows
from decovae.errors import InputError
from decovae.generation.contact_sheet import central_planes, pixel_sizes

HEIGHT = 218
"""Pixels of a picture, about a millimetre each."""

MOST_DIFFERENCE = 0.2
"""The absolute difference of intensities, of 1, that has the brightest colour."""


@dataclass(frozen=True)
class Scan:
    """A volume to show: `voxels` (D, H, W), float32, clipped to [0, 1], in RAS axes, and where they lie."""

    voxels: np.ndarray
    frame: Frame


def read_scan(path: Path) -> Scan:
    """A NIfTI file's volume.

    Raises:
        InputError: it is missing, damaged, not 3D, or holds values that are not finite.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nib.as_closest_canonical(nib.load(path))
        voxels = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error, ImageFileError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"{path}: is no readable NIfTI volume ({reason}); make it again.") from error
    if voxels.ndim != 3:
        raise InputError(f"{path}: is {voxels.ndim}D; a volume has 3 dimensions.")
    if not np.isfinite(voxels).all():
        raise InputError(f"{path}: holds values that are not finite; make it again.")
    depth, height, width = voxels.shape
    return Scan(voxels.clip(0, 1), Frame((depth, height, width), affine_rows(image.affine)))


def grey_picture(scan: Scan) -> str:
    """The three planes through the centre side by side, intensity 0 black and 1 white, as a data address."""
    return data_uri(_montage(scan.voxels, scan.frame))


def difference_picture(first: Scan, second: Scan) -> str:
    """The same planes of the absolute difference, in the colours of `difference_scale`, as a data address.

    Raises:
        ValueError: the volumes have different shapes.
    """
    if first.voxels.shape != second.voxels.shape:
        raise ValueError(f"volumes of {first.voxels.shape} and {second.voxels.shape} voxels have no difference")
    difference = np.abs(first.voxels - second.voxels) / MOST_DIFFERENCE
    return data_uri(_coloured(_montage(difference, first.frame)))


def difference_scale() -> str:
    """The colours of `difference_picture` from no difference, left, to `MOST_DIFFERENCE`, right, as a data address."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (12, 1))
    return data_uri(_coloured(Image.fromarray(ramp)))


def data_uri(image: Image.Image, *, lossless: bool = False) -> str:
    """A picture as WebP, exact or hardly distinguishable, in a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=lossless, quality=60 if lossless else 90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def png_uri(content: bytes) -> str:
    """The bytes of a PNG file in a ``data:`` address."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _montage(volume: np.ndarray, frame: Frame) -> Image.Image:
    images = []
    for plane, (down, across) in zip(central_planes(volume), pixel_sizes(frame), strict=True):
        tall, wide = plane.shape[0] * down, plane.shape[1] * across
        images.append((Image.fromarray(np.round(255 * plane).astype(np.uint8)), wide, tall))
    scale = HEIGHT / max(tall for _, _, tall in images)
    resized = [
        image.resize((round(wide * scale), round(tall * scale)), Image.Resampling.BILINEAR)
        for image, wide, tall in images
    ]
    picture = Image.new("L", (sum(image.width for image in resized), HEIGHT))
    left = 0
    for image in resized:
        picture.paste(image, (left, (HEIGHT - image.height) // 2))
        left += image.width
    return picture


def _coloured(image: Image.Image) -> Image.Image:
    from matplotlib import colormaps

    return Image.fromarray(colormaps["inferno"](np.asarray(image), bytes=True)[..., :3])
