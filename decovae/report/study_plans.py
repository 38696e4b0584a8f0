"""What each study trains: its steps, its volumes, and why these."""

from __future__ import annotations

from dataclasses import dataclass

from decovae.training.config import Preset


@dataclass(frozen=True)
class Plan:
    """What a study trains and samples, beside what its options say.

    Attributes:
        preset: of the trainings.
        samples: volumes to sample from each flow; with 0 there are neither flows nor samples.
        data: options of train/vae.py on its volumes, the template cohort's; all later steps take them from its run.
        vae: more options of train/vae.py.
        decoder: more options of train/decoder.py.
        flow: more options of train/flow.py.
        latent_seeds: seeds of further autoencoders, trained and analysed alone, for Table 1's mean and deviation; COV,
            which is not in the paper's, has none.
        processes: that a command has by default, where the batch is meant for so many; None is one a GPU.
    """

    preset: Preset
    samples: int
    data: tuple[str, ...] = ()
    vae: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    flow: tuple[str, ...] = ()
    latent_seeds: tuple[int, ...] = ()
    processes: int | None = None

    @property
    def generates(self) -> bool:
        """Whether flows are trained and sampled from."""
        return self.samples > 0


def _mini(*, subjects: int, vae: str, decoder: str, latent_seeds: tuple[int, ...] = ()) -> Plan:
    """The paper's network, patches and batch in a few thousand steps, without flows.

    Learning rates, start and warm-up are for a short run: 2e-4 where the paper has 1e-4 (2e-3 of the quickstart, whose
    channels are an eighth as many, comes to 2.5e-4 here), noise that starts small, channels that start orthogonal. The
    decoder's discriminators are new: they learn as fast as the autoencoder's did. A quarter of the subjects is held
    out, and all of these are evaluated: a Fréchet distance needs many slices.
    """
    start = "--optimizer.learning-rate 2e-4 --optimizer.warmup-steps 100 --initial-log-variance -6 --initial-orthogonal"
    tune = "--optimizer.learning-rate 5e-5 --optimizer.discriminator-learning-rate 1e-4 --optimizer.warmup-steps 20"
    return Plan(
        "paper",
        samples=0,
        # The preset's four loaders: a patch of a volume of 1 mm takes 0.02 s to resize on a slow core (measured) and is
        # augmented on the GPU, so four make a batch in 0.01 s, and a step of an H200 takes about 0.11 s (predicted).
        # Eight would not fit the 64 MB of shared memory that containers have by default.
        data=tuple(f"--data.cohort-size {subjects} --data.validation-fraction 0.25".split()),
        vae=tuple(f"{vae} {start} --checkpoint-every 500".split()),
        decoder=tuple(f"{decoder} {tune} --checkpoint-every 500".split()),
        latent_seeds=latent_seeds,
        processes=1,
    )


PLANS = {
    "quickstart": Plan(
        "quickstart",
        samples=10,
        data=tuple("--data.cohort-size 32 --data.validation-fraction 0.25".split()),
        # The paper's KL weight acts over 100,000 steps; in 400 it would leave the channels' means, which the cosine
        # similarity does not subtract, where they began.
        vae=tuple("--steps 400 --validate-every 400 --loss.kl 5e-3".split()),
        decoder=tuple("--steps 60 --validate-every 60".split()),
        flow=tuple("--steps 300 --validate-every 300 --preview.samples 0".split()),
        latent_seeds=(43, 44),  # a seed alone decides in so few steps how SID and VAD compare
    ),
    # Half an hour and three hours of one H200, as `decovae.report.study_trainings.forecast` predicts from counted
    # operations; neither is measured. KL weights lie between the quickstart's 5e-3 for 400 steps and the paper's 5e-4
    # for 100,000, as far along in their logarithm as the steps are in theirs: 2.7e-3 for 1,800, 1.6e-3 for 6,500. The
    # adversaries join at half time: before, they would learn to tell blurs from brains, and cost time.
    "mini": _mini(
        subjects=48,
        vae="--steps 1800 --validate-every 900 --loss.kl 2.7e-3 --loss.adversarial-warmup 900",
        decoder="--steps 250 --validate-every 250 --loss.adversarial-warmup 100",
    ),
    "mini-3h": _mini(
        subjects=96,
        vae="--steps 6500 --validate-every 1625 --loss.kl 1.6e-3 --loss.adversarial-warmup 3250",
        decoder="--steps 1000 --validate-every 500 --loss.adversarial-warmup 250",
        latent_seeds=(43, 44),
    ),
    "paper": Plan("paper", samples=1000),
}
"""By name."""
