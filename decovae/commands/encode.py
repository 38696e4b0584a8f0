"""``decovae encode``: the latents of a cohort, to train a flow on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from decovae.data.volumes import LeftOut, Shape, Volumes, times

if TYPE_CHECKING:
    from decovae.generation.latents import LatentStore
    from decovae.runtime import Runtime
    from decovae.training.config import DataConfig


ANY_SIZE: Shape = (1, 1, 1)
"""The least a volume must have: it is resized as a whole, and no patch is cut from it."""


@dataclass(frozen=True, kw_only=True)
class EncodeData:
    """Which volumes to encode."""

    root: Path | None = None
    """A store of `decovae prepare`, a folder with .nii or .nii.gz anywhere below it, or a CSV manifest with a `path`
    column; other columns are kept beside the latents. By default the volumes that RUN was trained on."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode whole volumes: mean μ and standard deviation σ of each one's latent, in 16 bits.

    The same command with the same --out goes on where it was stopped. With several processes:
    torchrun --nproc_per_node 4 -m decovae.cli encode RUN …
    """

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of a finished run of train/vae.py or train/decoder.py."""
    data: EncodeData = field(default_factory=EncodeData)
    out: Path | None = None
    """Folder for the latents; by default `latents` in RUN."""
    leave_out_unusable: bool = False
    """Encode the others when volumes of a folder or manifest cannot be used, and name those, instead of stopping at the
    first; those that a store was prepared without are in its excluded.csv."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the encoder: auto is that of the latents that --out holds already, else bf16 autocast on CUDA and
    fp32 on the CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode: auto is CUDA where there is a GPU."""


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 1 if it could not go on, 2 for a wrong input."""
    from decovae.runtime import start_runtime
    from decovae.training.command_line import exit_code, parse_options

    def encode() -> None:
        config = parse_options(EncodeConfig, arguments, program="decovae encode")
        with start_runtime(config.device) as runtime:
            _encode(config, runtime)

    return exit_code(encode, stopped="stopped; the same command goes on from the last finished file.")


def _encode(config: EncodeConfig, runtime: Runtime) -> None:
    from decovae.generation.encoding import encode_volumes
    from decovae.models.weights import load_autoencoder
    from decovae.training.finished import open_vae
    from decovae.training.volumes import check_unchanged, describe, remarks, split

    vae = runtime.on_main(lambda: open_vae(config.run, option="decovae encode"))
    data = vae.config.data if config.data.root is None else replace(vae.config.data, root=config.data.root)
    runtime.fill_caches(lambda: _open(data, config))
    volumes, left_out = _open(data, config)
    runtime.on_main(lambda: check_unchanged(volumes, data, vae))
    training, validation = split(volumes, data)
    store = encode_volumes(
        load_autoencoder(vae.weights),
        volumes,
        training=training,
        validation=validation,
        grid=data.grid,
        out=config.out if config.out is not None else config.run / "latents",
        runtime=runtime,
        data=describe(data),
        left_out=left_out,
        precision=config.precision,
    )
    if runtime.main:
        for line in [*summary(store, volumes), *remarks(volumes, data)]:
            print(line)


def _open(data: DataConfig, config: EncodeConfig) -> tuple[Volumes, list[LeftOut]]:
    from decovae.data.nifti import open_usable_nifti
    from decovae.data.store import is_store
    from decovae.training.volumes import open_volumes

    if data.root is not None and config.leave_out_unusable and not is_store(data.root):
        return open_usable_nifti(data.root, patch=ANY_SIZE)
    return open_volumes(replace(data, patch=ANY_SIZE)), []


def summary(store: LatentStore, volumes: Volumes) -> Iterator[str]:
    """Lines on a finished store: how much it holds, how the latents are distributed, and who is missing."""
    from decovae.generation.encoding import commonest_frame
    from decovae.metrics.latents import analyze_latents

    space, training = store.space, store.training
    yield (
        f"{store.folder}: {len(store.records)} latents of {times((space.channels, *space.shape))}, "
        f"{len(training)} for training and {len(store.validation)} for validation, "
        f"of volumes resized to {times(space.grid)}, encoded in {store.precision}."
    )
    yield (
        f"  μ has mean {space.mean:.4g} and standard deviation {space.std:.4g} over the training split, "
        f"σ is {space.noise:.4g} (root mean square)."
    )
    use = analyze_latents(store.moments)
    shares = " ".join(f"{share:.3f}" for share in use.explained_variance.tolist())
    yield (
        f"  channels: mean |Pearson| {use.pearson:.3f}, mean |cosine| {use.cosine_similarity:.3f}, effective rank "
        f"{use.effective_rank:.2f} of {space.channels}, explained variance {shares}"
    )
    encoded = {(record.subject, record.source) for record in store.records if record.split == "training"}
    records = [record for record in volumes.records if (record.subject, record.source) in encoded]
    _, alike = commonest_frame(records)
    if alike < len(records):
        yield (
            f"  note: {len(records) - alike} training volumes differ from the commonest in voxels or affine; samples "
            f"will be put into the commonest: {times(space.frame.shape)} voxels."
        )
    for entry in store.left_out:
        yield f"  left out: {entry.subject}: {entry.reason}"
    if store.left_out:
        yield f"  {len(store.left_out)} volumes left out, as {store.folder / 'index.json'} says too."
