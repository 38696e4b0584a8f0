"""The trainings of a study as their commands will read them: checked, and forecast, before any of them begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from decovae.errors import InputError
from decovae.losses.perceptual import RANDOM, PerceptualLoss
from decovae.models.autoencoder import AutoencoderConfig
from decovae.report.study import Cell
from decovae.training.checks import check
from decovae.training.command_line import parse
from decovae.training.config import DecoderConfig, FlowConfig, RunConfig, VAEConfig
from decovae.training.presets import DECODER_PRESETS, FLOW_PRESETS, VAE_PRESETS

MATRIX_RATE = 989e12
"""Dense bf16 products of an H200, operations a second, as its data sheet has it."""

SHARE = 0.2
"""Of it that a step is assumed to reach, norms and all else that waits for memory included: an assumption."""

TRAINING, TUNING, ENCODING, DECODING = 19.44e12, 14.09e12, 6.35e12, 8.70e12
"""Operations, counted on fake tensors: a step on 2×96³, discriminators and LPIPS included, of the autoencoder (19.05 of
them its own) and of the decoder, and a volume of 128×256×128 through the encoder and through the decoder."""

LAUNCHES = 0.015
"""Assumed seconds a step for what is small and many: LPIPS, discriminators, optimisers."""

START, COMPILATION, CHECKPOINT, EMBEDDING = 12.0, 25.0, 2.0, 10.0
"""Assumed seconds: a command from its start to its first operation, torch.compile of what is not fused, a checkpoint of
0.3 GB, t-SNE of 2,000 codes."""

SUBJECT = 2.0 / 8
"""Seconds that a subject of the cohort at 1 mm takes to make: 2.0 on a slow core (measured), on eight."""

RESIZED, EVALUATED = 0.1, 0.6
"""Seconds to read and resize a volume on a slow core (measured), and assumed ones for a volume's measures beside it."""


@dataclass(frozen=True)
class Trainings:
    """What every model of a study goes through; models differ in loss and seed alone.

    Attributes:
        vae: the autoencoder's training.
        decoder: its fine-tuning, or None where there are only autoencoders.
        flow: the flow's training, or None.
    """

    vae: VAEConfig
    decoder: DecoderConfig | None
    flow: FlowConfig | None


def read_trainings(planned: Sequence[Cell]) -> Trainings:
    """The trainings of a study.

    Raises:
        InputError: an option that the training does not know or cannot use.
    """
    first = {cell.tool: cell.arguments for cell in reversed(planned)}
    vae = parse(VAE_PRESETS, first["train/vae.py"], default="quickstart")
    decoder = flow = None
    if "train/decoder.py" in first:
        # As the command does: the volumes are those of the autoencoder.
        presets = {name: (about, replace(preset, data=vae.data)) for name, (about, preset) in DECODER_PRESETS.items()}
        decoder = parse(presets, first["train/decoder.py"], default="quickstart")
    if "train/flow.py" in first:
        flow = parse(FLOW_PRESETS, first["train/flow.py"], default="quickstart")
    return Trainings(vae, decoder, flow)


def check_trainings(trainings: Trainings) -> None:
    """Refuse now what a command would refuse when its turn comes, perhaps after hours: options, and perceptual weights
    that cannot be had; they are downloaded here.

    Raises:
        InputError: naming the option.
    """
    for config in (trainings.vae, trainings.decoder, trainings.flow):
        if config is not None:
            check(config)
    losses = [config.loss for config in (trainings.vae, trainings.decoder) if config is not None]
    try:
        for network in {loss.perceptual_network for loss in losses if loss.perceives} - {RANDOM}:
            PerceptualLoss(network)
    except InputError as error:
        reason = str(error).partition(";")[0]
        raise InputError(
            f"{reason}; give --perceptual random (a proxy, no download), none, or the path of a squeezenet1_1 weights "
            "file."
        ) from error


def forecast(planned: Sequence[Cell], trainings: Trainings) -> float | None:
    """Seconds that a study takes on one H200, one command at a time: predicted, not measured.

    None for a network or volumes whose operations were not counted, and for flows.
    """
    vae, decoder = trainings.vae, trainings.decoder
    data, counted = vae.data, VAEConfig()
    sizes = (vae.model, data.grid, data.patch, data.batch_size), (AutoencoderConfig(), *_sizes(counted))
    if sizes[0] != sizes[1] or data.root is not None or data.cohort_shape != counted.data.cohort_shape:
        return None
    if trainings.flow is not None:
        return None
    rate = SHARE * MATRIX_RATE
    held_out = min(data.validation_limit, max(1, round(data.validation_fraction * data.cohort_size)))
    reconstruction = RESIZED + EVALUATED + (ENCODING + DECODING) / rate
    seconds = {
        "vae": START + COMPILATION + _steps(vae, TRAINING / rate, validation=held_out * reconstruction),
        "encode": START + data.cohort_size * (RESIZED + ENCODING / rate),
        "analyze": START + EMBEDDING,
        "evaluate-vae": START + held_out * reconstruction,
        "evaluate-decoder": START + held_out * reconstruction,
    }
    if decoder is not None:
        validation = held_out * reconstruction
        seconds["decoder"] = START + COMPILATION + _steps(decoder, TUNING / rate, validation=validation)
    return data.cohort_size * SUBJECT + sum(seconds[cell.name.rpartition("/")[2]] for cell in planned)


def _sizes(config: VAEConfig) -> tuple[object, ...]:
    return config.data.grid, config.data.patch, config.data.batch_size


def _steps(config: RunConfig, operations: float, *, validation: float) -> float:
    """Seconds of all steps, of the validations among them, one before the first, and of the checkpoints."""
    validations = 1 + -(-config.steps // config.validate_every)
    checkpoints = -(-config.steps // config.checkpoint_every)
    return config.steps * (operations + LAUNCHES) + validations * validation + checkpoints * CHECKPOINT
