"""Values that cannot be trained with, refused before anything is read or written."""

from __future__ import annotations

from decovae.errors import InputError
from decovae.training.config import AdversarialConfig, DecoderConfig, FlowConfig, RunConfig, TrainingConfig, VAEConfig
from decovae.training.trackers import check_trackers

SMALLEST_PATCH = 24
"""Voxels an axis below which the discriminators' last instance norm, or SqueezeNet, has nothing left to look at."""


def check(config: TrainingConfig) -> None:
    """Refuse values that cannot be trained with.

    Raises:
        InputError: naming the option and its value.
    """
    _check_numbers(config)
    check_trackers(config)
    if not config.parallel.timeout > 0:
        raise InputError(f"--parallel.timeout {config.parallel.timeout}: must be above 0 seconds.")
    if not 0 <= config.optimizer.ema_decay < 1:
        raise InputError(f"--optimizer.ema-decay {config.optimizer.ema_decay}: must be at least 0 and below 1.")
    if isinstance(config, FlowConfig):
        _check_flow(config)
        return
    _check_data(config)
    _check_loss(config)
    if isinstance(config, VAEConfig):
        _check_model(config)
    else:
        _check_decoder(config)


def _check_numbers(config: TrainingConfig) -> None:
    at_least_one, not_negative = _numbers_of_any_run(config)
    if isinstance(config, AdversarialConfig):
        at_least_one |= {
            "--data.cohort-size": config.data.cohort_size,
            "--data.validation-limit": config.data.validation_limit,
        }
        not_negative |= {
            "--data.seed": config.data.seed,
            "--optimizer.discriminator-learning-rate": config.optimizer.discriminator_learning_rate,
            "--loss.adversarial-warmup": config.loss.adversarial_warmup,
            "--loss.l1": config.loss.l1,
            "--loss.kl": config.loss.kl,
            "--loss.deco": config.loss.deco or 0,
            "--loss.perceptual": config.loss.perceptual,
            "--loss.adversarial-slices": config.loss.adversarial_slices,
            "--loss.adversarial-volume": config.loss.adversarial_volume,
            "--loss.discriminator": config.loss.discriminator,
        }
    if isinstance(config, VAEConfig):
        at_least_one |= {
            "--model.residual-blocks": config.model.residual_blocks,
            "--model.latent-channels": config.model.latent_channels,
            "--model.groups": config.model.groups,
        }
    elif isinstance(config, DecoderConfig):
        not_negative["--noise-scale"] = config.noise_scale
    else:
        at_least_one |= {
            "--model.residual-blocks": config.model.residual_blocks,
            "--model.groups": config.model.groups,
            "--model.head-channels": config.model.head_channels,
            "--preview.every": config.preview.every,
            "--preview.steps": config.preview.steps,
        }
        not_negative["--preview.samples"] = config.preview.samples
    for option, value in at_least_one.items():
        if value < 1:
            raise InputError(f"{option} {value}: must be at least 1.")
    for option, value in not_negative.items():
        if not value >= 0:
            raise InputError(f"{option} {value}: must not be negative.")


def _numbers_of_any_run(config: RunConfig) -> tuple[dict[str, float], dict[str, float]]:
    at_least_one: dict[str, float] = {
        "--data.batch-size": config.data.batch_size,
        "--data.prefetch": config.data.prefetch,
        "--steps": config.steps,
        "--validate-every": config.validate_every,
        "--checkpoint-every": config.checkpoint_every,
        "--keep-checkpoints": config.keep_checkpoints,
        "--telemetry.profile-steps": config.telemetry.profile_steps,
        "--log-every": config.log_every,
        "--optimizer.accumulation": config.optimizer.accumulation,
    }
    not_negative: dict[str, float] = {
        "--seed": config.seed,
        "--keep-best": config.keep_best,
        "--skip-limit": config.skip_limit,
        "--telemetry.profile-at": config.telemetry.profile_at or 0,
        "--data.workers": config.data.workers,
        "--optimizer.learning-rate": config.optimizer.learning_rate,
        "--optimizer.weight-decay": config.optimizer.weight_decay,
        "--optimizer.eps": config.optimizer.eps,
        "--optimizer.warmup-steps": config.optimizer.warmup_steps,
        "--optimizer.clip-norm": config.optimizer.clip_norm,
    }
    return at_least_one, not_negative


def _check_data(config: AdversarialConfig) -> None:
    data = config.data
    too_small = any(room < size for room, size in zip(data.cohort_shape, data.patch, strict=True))
    if data.root is None and too_small:
        raise InputError(
            f"--data.cohort-shape {_spaced(data.cohort_shape)}: smaller than --data.patch {_spaced(data.patch)}."
        )
    if any(p > g for p, g in zip(data.patch, data.grid, strict=True)):
        raise InputError(f"--data.patch {_spaced(data.patch)}: does not fit --data.grid {_spaced(data.grid)}.")
    if not 0 < data.validation_fraction < 1:
        raise InputError(f"--data.validation-fraction {data.validation_fraction}: must be between 0 and 1.")
    if not 0 <= data.foreground <= 1:
        raise InputError(f"--data.foreground {data.foreground}: must be at least 0 and at most 1.")


def check_compression(config: AdversarialConfig, factor: int) -> None:
    """Refuse a grid or a patch that the autoencoder's downsamplings do not divide.

    Raises:
        InputError: naming the option and its value.
    """
    for option, shape in {"--data.grid": config.data.grid, "--data.patch": config.data.patch}.items():
        if any(size < factor or size % factor for size in shape):
            raise InputError(f"{option} {_spaced(shape)}: every axis must be a positive multiple of {factor}.")


def _check_loss(config: AdversarialConfig) -> None:
    loss = config.loss
    if not loss.gamma > 0:
        raise InputError(f"--loss.gamma {loss.gamma}: must be above 0.")
    if not 0 < loss.slice_fraction <= 1:
        raise InputError(f"--loss.slice-fraction {loss.slice_fraction}: must be above 0 and at most 1.")
    if loss.l1 == 0 and not loss.perceives and not loss.adversarial:
        raise InputError(
            "--loss.l1 0: with the perceptual and adversarial terms off nothing asks for a reconstruction."
        )
    if min(config.data.patch) < SMALLEST_PATCH and (loss.adversarial or loss.perceives):
        raise InputError(
            f"--data.patch {_spaced(config.data.patch)}: discriminators and perceptual features need {SMALLEST_PATCH} "
            "voxels an axis; enlarge it, or set their weights (--loss.adversarial-*, --loss.perceptual) to 0."
        )


def _check_model(config: VAEConfig) -> None:
    model = config.model
    if not model.channels or min(model.channels) < 1:
        raise InputError(f"--model.channels {_spaced(model.channels)}: give a positive number for each level.")
    if model.image_channels != 1:
        raise InputError(f"--model.image-channels {model.image_channels}: volumes have 1.")
    if any(width % model.groups for width in model.channels):
        raise InputError(
            f"--model.groups {model.groups}: must divide every one of --model.channels {_spaced(model.channels)}."
        )
    check_compression(config, model.compression)


def _check_decoder(config: DecoderConfig) -> None:
    if config.loss.kl or config.loss.deco:
        raise InputError("--loss.kl and --loss.deco act on the encoder, which is frozen here: leave them at 0.")


def _check_flow(config: FlowConfig) -> None:
    model = config.model
    if config.vae is None and config.latents is None:
        raise InputError("--vae: give the folder of a finished autoencoder run, or --latents with encoded latents.")
    if not model.channels or min(model.channels) < 1:
        raise InputError(f"--model.channels {_spaced(model.channels)}: give a positive number for each level.")
    if len(model.attention) != len(model.channels):
        raise InputError(
            f"--model.attention: gives {len(model.attention)} levels, --model.channels {len(model.channels)}; give one "
            "True or False a level."
        )
    if any(width % model.groups for width in model.channels):
        raise InputError(
            f"--model.groups {model.groups}: must divide every one of --model.channels {_spaced(model.channels)}."
        )
    attended = [width for width, attends in zip(model.channels, model.attention, strict=True) if attends]
    for width in (*attended, model.channels[-1]):
        if width % model.head_channels:
            raise InputError(
                f"--model.head-channels {model.head_channels}: must divide the {width} channels that are attended to, "
                "and those in the middle always are."
            )
    if not config.time_scale > 0:
        raise InputError(f"--time-scale {config.time_scale}: must be above 0.")
    if not 0 <= config.condition_dropout < 1:
        raise InputError(f"--condition-dropout {config.condition_dropout}: must be at least 0 and below 1.")
    if config.preview.samples and config.preview.every % config.validate_every:
        raise InputError(
            f"--preview.every {config.preview.every}: must be a multiple of --validate-every {config.validate_every}."
        )


def _spaced(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))
