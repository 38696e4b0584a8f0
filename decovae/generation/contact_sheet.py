"""Pictures of many volumes at once: three planes through the centre of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from decovae.data.frame import Frame
from decovae.files import write_atomically
from decovae.metrics.slice_features import AXES

MOST_SAMPLES = 16
COLUMNS = 4


def central_planes(volume: np.ndarray) -> list[np.ndarray]:
    """The slices in the middle of `AXES`: a picture's rows run from superior (or anterior) down, left is left.

    Args:
        volume: (D, H, W) in RAS axes.

    Returns:
        Axial (H, D), coronal (W, D), sagittal (W, H), each clipped to [0, 1].
    """
    return [np.rot90(volume.take(volume.shape[axis] // 2, axis=axis)).clip(0, 1) for axis in AXES.values()]


def pixel_sizes(frame: Frame) -> list[tuple[float, float]]:
    """For each of `AXES` the height and the width of a pixel in millimetres."""
    across, along, up = (float(size) for size in np.linalg.norm(frame.matrix[:3, :3], axis=0))
    return [(along, across), (up, across), (up, along)]


def montage(volume: np.ndarray, frame: Frame, *, least_width: int = 0) -> Image.Image:
    """The three planes side by side in grey on black, pixels as wide as high, intensities 0 to 1 as 0 to 255.

    Args:
        volume: (D, H, W) in RAS axes.
        frame: of the volume, for the shape of its voxels.
        least_width: pixels; a picture that would be narrower is enlarged.
    """
    sizes = pixel_sizes(frame)
    planes = central_planes(volume)
    width = sum(plane.shape[1] * across for plane, (_, across) in zip(planes, sizes, strict=True))
    scale = max(1 / min(map(min, sizes)), least_width / width)  # pixels a millimetre
    images = [
        Image.fromarray(np.round(255 * plane).astype(np.uint8)).resize(
            (round(plane.shape[1] * across * scale), round(plane.shape[0] * down * scale)), Image.Resampling.BILINEAR
        )
        for plane, (down, across) in zip(planes, sizes, strict=True)
    ]
    picture = Image.new("L", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        picture.paste(image, (left, (picture.height - image.height) // 2))
        left += image.width
    return picture


def save_contact_sheet(
    volumes: Iterable[np.ndarray], path: Path, *, frame: Frame, title: str, labels: Sequence[str] | None = None
) -> None:
    """A PNG of up to 16 volumes, four in a row, under a title that begins with ``synthetic``.

    Args:
        volumes: each (D, H, W) in RAS axes, intensities shown from 0 to 1; taken one at a time, those after the 16th
            not at all.
        path: the PNG to write; it appears whole or not at all.
        frame: of the volumes, for the shape of their voxels.
        title: printed above, behind ``synthetic``.
        labels: printed above each volume; by default its number.

    Raises:
        ValueError: there are no volumes.
        OSError: the file cannot be written.
    """
    shown = [montage(volume, frame) for volume in islice(volumes, MOST_SAMPLES)]
    if not shown:
        raise ValueError("a contact sheet shows at least one volume")
    columns = min(len(shown), COLUMNS)
    rows = -(-len(shown) // columns)
    width = 3.6  # inches a volume
    height = width * shown[0].height / shown[0].width + 0.3
    figure = Figure(figsize=(columns * width, rows * height + 0.3), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    heading = f"synthetic: {title}"
    figure.suptitle(heading, fontsize=10)
    cells = figure.subplots(rows, columns, squeeze=False)
    for cell in cells.flat:
        cell.set_axis_off()
    for number, (cell, picture) in enumerate(zip(cells.flat, shown, strict=False)):
        cell.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255)
        cell.set_title(str(number) if labels is None else labels[number], fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100, metadata={"Title": heading}))
