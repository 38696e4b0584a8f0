"""Encoding whole volumes to latents, by any number of processes, continued where it was stopped."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from decovae.data.frame import Frame
from decovae.data.patches import load_volume
from decovae.data.volumes import LeftOut, Shape, VolumeRecord, Volumes
from decovae.errors import InputError, RunError
from decovae.generation.ahead import worked_ahead
from decovae.generation.encoding_plan import Encoded, Plan, planned_row, unwritable
from decovae.generation.latent_space import LatentSpace
from decovae.generation.latents import LatentRecord, LatentStore, Precision, kept_precision, open_latents, write_index
from decovae.generation.progress import Progress
from decovae.generation.shards import read_header, shard_path
from decovae.generation.side_by_side import volumes_at_once
from decovae.losses.moments import ChannelMoments
from decovae.models.autoencoder import Autoencoder, AutoencoderConfig
from decovae.models.weights import encoder_fingerprint
from decovae.runtime import Runtime
from decovae.threads import one_thread


def encode_volumes(
    autoencoder: Autoencoder,
    volumes: Volumes,
    *,
    training: Sequence[int],
    validation: Sequence[int],
    grid: Shape,
    out: Path,
    runtime: Runtime,
    data: str,
    left_out: Sequence[LeftOut] = (),
    precision: Precision | Literal["auto"] = "auto",
) -> LatentStore:
    """Write μ and σ of whole volumes to a folder, and open it. Every process of the run calls this.

    A volume is resized to `grid`, scaled and not clipped, as in training, and encoded alone; on the CPU by one thread,
    while other threads encode other volumes. So the bits of a latent depend on the volume, the autoencoder and the kind
    of machine, not on how many processes or threads there are. Shards are dealt to the processes. Those that an earlier
    call left behind are checked and kept; what is missing or damaged is encoded. The folder's bytes are those of a call
    that was never stopped. The manifest's columns stand in the index alone: where others have come, it is written
    anew, and nothing is encoded again.

    Args:
        autoencoder: is moved to the device and set to evaluation mode.
        volumes: where the volumes are.
        training, validation: which of them to encode; none twice, at least one for training.
        grid: voxels that every volume is resized to.
        out: the folder to fill, on storage that all processes see.
        runtime: the processes.
        data: a sentence on what the volumes are, for the `LatentSpace`.
        left_out: volumes that cannot be used, to be named in the index.
        precision: of the encoder: float32, or bfloat16 by autocast; "auto" is that of the latents that are there, else
            bfloat16 on CUDA and float32 on the CPU.

    Raises:
        InputError: `grid` does not suit the autoencoder; `out` holds other files, or latents of another autoencoder,
            grid, precision or of other volumes, or cannot be written; a volume cannot be read.
        RunError: a latent is not finite or does not fit into 16 bits (names the subject), or all are one number.
        ValueError: an index stands twice, or there is none for training.
    """
    factor = autoencoder.config.compression
    if any(size < factor or size % factor for size in grid):
        raise InputError(f"grid {grid}: every axis must be a positive multiple of {factor}, the autoencoder's factor.")
    chosen = sorted([*training, *validation])
    if not training or len(set(chosen)) < len(chosen):
        raise ValueError("training is empty, or an index stands twice in training and validation")
    of_training = set(training)
    runtime.place(autoencoder).eval()
    usual: Precision = "bf16" if runtime.device.type == "cuda" else "fp32"
    arithmetic = runtime.on_main(lambda: kept_precision(out) or usual) if precision == "auto" else precision
    plan = Plan(
        out,
        {"encoder": encoder_fingerprint(autoencoder), "grid": list(grid), "precision": arithmetic},
        [planned_row(volumes.records[index], "training" if index in of_training else "validation") for index in chosen],
        [volumes.records[index].columns for index in chosen],
    )
    runtime.on_main(lambda: plan.prepare_folder(autoencoder))
    if not all(runtime.gather(out.is_dir())):
        raise InputError(f"{out}: not every node sees it; give a folder on storage that all nodes share.")

    def load(place: int) -> Tensor:
        return load_volume(volumes, chosen[place], grid)

    def encode(place: int, image: Tensor) -> Encoded:
        with torch.no_grad(), torch.autocast(runtime.device.type, torch.bfloat16, enabled=arithmetic == "bf16"):
            mu, log_variance = autoencoder.encode(image[None].to(runtime.device))
        return _in_16_bits(mu[0], log_variance[0], volumes.records[chosen[place]])

    _fill(plan, runtime, load, encode, at_once=volumes_at_once(runtime, autoencoder.config, grid))
    frame, _ = commonest_frame([volumes.records[index] for index in sorted(training)])

    def finish() -> None:
        _write_index(plan, autoencoder.config, frame=frame, data=data, left_out=left_out)

    runtime.on_main(finish)
    return open_latents(out)


def _fill(
    plan: Plan,
    runtime: Runtime,
    load: Callable[[int], Tensor],
    encode: Callable[[int, Tensor], Encoded],
    *,
    at_once: int,
) -> None:
    """Make and write the shards that are missing, those of this process."""
    missing = plan.pending(runtime)
    mine = missing[runtime.rank :: runtime.world]
    places = [place for number in mine for place in plan.places(number)]
    on_cpu = runtime.device.type == "cpu"
    ahead = worked_ahead(places, load, encode, lambda _, latent: latent, threads=at_once, on_cpu=on_cpu)
    with Progress("Encoding", len(places), visible=runtime.main) as progress:
        if kept := len(plan.numbers) - len(missing):
            progress.say(f"{plan.folder}: {kept} of {len(plan.numbers)} files are there already.")
        with _same_bits(), contextlib.closing(ahead) as latents:
            for number in mine:
                shard = []
                for latent in itertools.islice(latents, len(plan.places(number))):
                    shard.append(latent)
                    progress.advance()
                plan.write(number, shard)
    runtime.gather(None)  # the others' shards are there too


@contextlib.contextmanager
def _same_bits() -> Iterator[None]:
    """One thread to an operator, and cuDNN's algorithms by rule, not by a race: sums are then taken in one order."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with one_thread():
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _in_16_bits(mu: Tensor, log_variance: Tensor, record: VolumeRecord) -> Encoded:
    """One latent's μ and σ from μ and log σ², `(C, d, h, w)`.

    Raises:
        RunError: they do not fit; names the subject.
    """
    mu = mu.float().cpu().contiguous()
    sigma = (0.5 * log_variance.float().cpu().contiguous()).exp()
    whose = f"The latent of {record.subject} ({record.source})"
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise RunError(f"{whose} is not finite: the encoder has diverged; train it again, or try --precision fp32.")
    largest = float(mu.abs().max())
    if largest > torch.finfo(torch.float16).max:
        raise RunError(f"{whose} reaches |μ| = {largest:.3g}, more than 16 bits hold: the encoder has diverged.")
    return Encoded(mu.half(), sigma.half())


def commonest_frame(records: Sequence[VolumeRecord]) -> tuple[Frame, int]:
    """Where most of the volumes lie, to a thousandth of a millimetre, and how many do; the first such frame at a tie.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("there are no records")
    frames = [Frame(record.shape, record.affine) for record in records]
    alike = [(frame.shape, *frame.matrix.round(3).ravel().tolist()) for frame in frames]
    [(commonest, count)] = Counter(alike).most_common(1)
    return frames[alike.index(commonest)], count


def _write_index(
    plan: Plan, config: AutoencoderConfig, *, frame: Frame, data: str, left_out: Sequence[LeftOut]
) -> None:
    """Write the index, from what the shards say of themselves, in the order of their rows."""
    rows = [row for number in plan.numbers for row in read_header(shard_path(plan.folder, number)).rows]
    training = [row for row in rows if row["split"] == "training"]
    packed = (torch.tensor(row["moments"], dtype=torch.float64) for row in training)
    moments = reduce(ChannelMoments.merge, (ChannelMoments(each, int(each[0])) for each in packed))
    mean = float(moments.mean.mean())
    # Over channels and voxels together: the channels' own scatter, and that of their means.
    variance = float(moments.scatter.diagonal().mean() / moments.count + (moments.mean - mean).square().mean())
    if variance == 0:
        raise RunError(f"{plan.folder}: every latent is {mean:g} everywhere; the encoder has collapsed.")
    depth, height, width = plan.settings["grid"]
    space = LatentSpace(
        encoder=plan.settings["encoder"],
        channels=config.latent_channels,
        shape=(depth // config.compression, height // config.compression, width // config.compression),
        grid=(depth, height, width),
        frame=frame,
        mean=mean,
        std=math.sqrt(variance),
        noise=math.sqrt(math.fsum(row["noise"] for row in training) / len(training)),
        data=data,
    )
    records = [
        LatentRecord(row["subject"], row["source"], row["split"], dict(columns))
        for row, columns in zip(rows, plan.columns, strict=True)
    ]
    store = LatentStore(plan.folder, space, records, [row["crc32"] for row in rows], moments, left_out)
    try:
        write_index(store)
    except OSError as error:
        raise unwritable(plan.folder, error) from error
