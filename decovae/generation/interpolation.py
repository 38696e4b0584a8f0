"""Paths from one brain to another: between the noises that two samples, or two subjects, come from."""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from decovae.data.frame import Frame
from decovae.data.volumes import times
from decovae.errors import InputError
from decovae.files import write_atomically
from decovae.generation.contact_sheet import montage
from decovae.generation.latent_space import LatentSpace
from decovae.generation.latents import LatentStore
from decovae.generation.sampling import Sampler

FRAME_MILLISECONDS = 200
MARGIN, LEAST_WIDTH = 18, 320
"""Pixels: above the planes, for the writing, and across a picture, that the writing fits."""


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """The point at `fraction` of the arc between two vectors, along which the length changes evenly.

    Straight lines between two noises pass through noises that are too short, of which the flow makes blurred brains.

    Args:
        start, end: of one shape, floating point; taken as vectors.
        fraction: 0 gives `start` and 1 gives `end`, to the bit.

    Returns:
        Of that shape, in the dtype of `start`.

    Raises:
        ValueError: the shapes differ.
    """
    if start.shape != end.shape:
        raise ValueError(f"both ends have one shape, not {tuple(start.shape)} and {tuple(end.shape)}")
    if fraction in (0, 1):
        return end if fraction else start
    a, b = start.double(), end.double()
    length_a, length_b = a.norm(), b.norm()
    cosine = float((a * b).sum() / (length_a * length_b).clamp(min=1e-300))
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6 or not length_a or not length_b:  # parallel, opposite or no vectors: no one arc
        return torch.lerp(a, b, fraction).to(start.dtype)
    direction = math.sin((1 - fraction) * angle) * a / length_a + math.sin(fraction * angle) * b / length_b
    return (direction / math.sin(angle) * torch.lerp(length_a, length_b, fraction)).to(start.dtype)


def encoded_subject(store: LatentStore, space: LatentSpace, subject: str) -> Tensor:
    """The mean of a subject's latent, of its first volume where it has several.

    Args:
        store: of latents.
        space: of the flow's latents.
        subject: its name.

    Returns:
        (C, d, h, w), float32, not standardised.

    Raises:
        InputError: the latents are not of the flow's encoder, or of another shape, or the subject is not among them, or
            its file is damaged.
    """
    if store.space.encoder != space.encoder:
        raise InputError(
            f"--latents {store.folder}: are of the encoder {store.space.encoder[:8]}…, the flow's of "
            f"{space.encoder[:8]}…; give those that the flow was trained on."
        )
    if (store.space.channels, store.space.shape) != (space.channels, space.shape):
        raise InputError(
            f"--latents {store.folder}: have {store.space.channels} channels of {times(store.space.shape)} voxels, "
            f"the flow's {space.channels} of {times(space.shape)}; give those that the flow was trained on."
        )
    subjects = [record.subject for record in store.records]
    if subject not in subjects:
        near = difflib.get_close_matches(subject, subjects, n=1) or subjects[:1]
        hint = f"; there is {near[0]}, for example" if near else ""
        raise InputError(f"--interpolate {subject}: no such subject in {store.folder}{hint}.")
    return store.read(subjects.index(subject))[0]


def fractions(frames: int) -> list[float]:
    """Where on a path its frames lie: from 0 to 1, evenly.

    Raises:
        ValueError: fewer than two frames.
    """
    if frames < 2:
        raise ValueError(f"a path has at least its two ends, not {frames} frames")
    return [frame / (frames - 1) for frame in range(frames)]


def noise_of(sampler: Sampler, latent: Tensor, condition: Tensor | None = None) -> tuple[Tensor, float]:
    """The noise that the flow takes to a latent, and how near it comes.

    Args:
        sampler: of the flow; its solver's error is that of the result.
        latent: (C, d, h, w), float32, not standardised: an encoded subject's μ.
        condition: (K,), None for none.

    Returns:
        The noise, (C, d, h, w), float32, on the CPU; and the root mean square of (what the flow makes of the noise −
        `latent`) over the standard deviation of latents.
    """
    noise = sampler.noises(latent[None], condition)
    again = sampler.latents(noise, condition)[0].cpu()
    error = (again - latent).double().square().mean().sqrt().item() / sampler.space.std
    return noise[0].cpu(), error


def save_animation(volumes: Iterable[np.ndarray], path: Path, *, frame: Frame, labels: Sequence[str]) -> None:
    """An animated GIF: three planes of each volume, there and back, for ever; each frame has ``synthetic`` on it.

    Args:
        volumes: each (D, H, W) in RAS axes, intensities shown from 0 to 1.
        path: the GIF to write; it appears whole or not at all.
        frame: of the volumes, for the shape of their voxels.
        labels: written on each frame behind ``synthetic``.

    Raises:
        ValueError: there are no volumes.
        OSError: the file cannot be written.
    """
    pictures = [_picture(volume, frame, label) for volume, label in zip(volumes, labels, strict=True)]
    if not pictures:
        raise ValueError("an animation has at least one frame")
    there_and_back = [*pictures, *pictures[-2:0:-1]]
    content = io.BytesIO()
    there_and_back[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=there_and_back[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
        comment=b"synthetic",
    )
    write_atomically(path, lambda file: file.write(content.getvalue()))


def _picture(volume: np.ndarray, frame: Frame, label: str) -> Image.Image:
    planes = montage(volume, frame, least_width=LEAST_WIDTH)
    picture = Image.new("L", (planes.width, MARGIN + planes.height))
    picture.paste(planes, (0, MARGIN))
    ImageDraw.Draw(picture).text((4, 3), f"synthetic   {label}", fill=255)
    return picture
