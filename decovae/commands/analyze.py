"""``decovae analyze``: how a latent space uses its channels, in numbers and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from decovae.errors import InputError

if TYPE_CHECKING:
    from decovae.evaluation.analysis import Analysis
    from decovae.evaluation.runs import Run
    from decovae.generation.latents import LatentStore
    from decovae.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """Cosine similarity, Pearson correlation, effective rank and explained variance of latent channels (Table 1), with
    Figures 1b, 2 and 3.

    The latents are read once. With several processes: torchrun --nproc_per_node 4 -m decovae.cli analyze RUN …
    """

    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN|LATENTS")]]
    """Folder of a finished run, whose latents are encoded first where there are none, or one of decovae encode."""
    out: Path | None = None
    """Folder for analysis.json, channels.csv and the pictures; by default `analysis` in RUN."""
    split: Literal["training", "validation", "all"] = "all"
    """Whose latents."""
    tsne_codes: int = 2000
    """Voxels' codes to embed in two dimensions; 0 for none."""
    seed: int = 0
    """Seed of their draw, and of the embedding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to encode, if there are no latents: auto is CUDA where there is a GPU."""


def main(arguments: Sequence[str]) -> int:
    """The command, from its options to its exit code: 0, 1 if it could not go on, 2 for a wrong input."""
    from decovae.evaluation.channels import FEWEST_CODES
    from decovae.runtime import start_runtime
    from decovae.training.command_line import exit_code, parse_options

    def analyze() -> None:
        config = parse_options(AnalyzeConfig, arguments, program="decovae analyze")
        if config.tsne_codes and config.tsne_codes < FEWEST_CODES:
            raise InputError(f"--tsne-codes {config.tsne_codes}: give {FEWEST_CODES} or more, or 0 for no t-SNE.")
        if config.seed < 0:
            raise InputError(f"--seed {config.seed}: give 0 or more.")
        with start_runtime(config.device) as runtime:
            _analyze(config, runtime)

    return exit_code(analyze, stopped="stopped; nothing was written.")


def _analyze(config: AnalyzeConfig, runtime: Runtime) -> None:
    from decovae.evaluation.channels import analyze_store
    from decovae.generation.latents import open_latents

    run = runtime.on_main(lambda: _run(config.source))
    folder = config.source if run is None else _latents_of(run, runtime)
    store = runtime.on_main(lambda: open_latents(folder))
    analysis = analyze_store(
        store,
        runtime,
        run=config.source.resolve().name if run is None else run.name,
        stage="latents" if run is None else run.config.stage,
        deco=None if run is None else run.deco,
        split=config.split,
        codes=config.tsne_codes,
        seed=config.seed,
    )
    out = config.out or _default_out(config.source, run)
    runtime.on_main(lambda: _write(analysis, out))
    if runtime.main:
        for line in summary(analysis, store, out):
            print(line)


def _run(source: Path) -> Run | None:
    """The run, or None for a folder of latents."""
    from decovae.evaluation.runs import open_run
    from decovae.generation.latents import INDEX
    from decovae.generation.shards import found_shards

    if source.is_dir() and ((source / INDEX).is_file() or found_shards(source)):
        return None
    return open_run(source, command="decovae analyze")


def _latents_of(run: Run, runtime: Runtime) -> Path:
    """Where a run's latents are: those that a flow was trained on, those of an autoencoder, made if need be.

    Raises:
        InputError: there are none and none can be made, or they are of another encoder than the run's.
    """
    from decovae.generation.flow_file import load_flow
    from decovae.generation.latents import open_latents
    from decovae.models.weights import encoder_fingerprint, load_autoencoder
    from decovae.training.config import FlowConfig
    from decovae.training.finished import FinishedVAE, open_vae
    from decovae.training.latents import check_latents, latents_of
    from decovae.training.run_folder import read_summary

    if isinstance(files := run.files, FinishedVAE):
        folder = latents_of(files, runtime)
        runtime.on_main(lambda: check_latents(folder, files, advice="remove them, or give their folder by itself"))
        return folder
    assert isinstance(run.config, FlowConfig)
    encoder = runtime.on_main(lambda: load_flow(files.flow)[1].space.encoder)
    named = runtime.on_main(lambda: (read_summary(run.folder) or {}).get("latents"))
    if named is not None and runtime.on_main(lambda: (Path(named) / "index.json").is_file()):
        _same_encoder(runtime.on_main(lambda: open_latents(Path(named)).space.encoder), Path(named), run, encoder)
        return Path(named)
    vae = run.config.vae
    if vae is None or not runtime.on_main(vae.is_dir):
        raise InputError(
            f"decovae analyze {run.folder}: the latents that it was trained on, {named}, are gone; give the folder of "
            "the autoencoder's run, or of its latents."
        )
    source = runtime.on_main(lambda: open_vae(vae, option="decovae analyze"))
    _same_encoder(runtime.on_main(lambda: encoder_fingerprint(load_autoencoder(source.weights))), vae, run, encoder)
    folder = latents_of(source, runtime)
    runtime.on_main(lambda: check_latents(folder, source, advice="remove them, or give their folder by itself"))
    return folder


def _same_encoder(found: str, folder: Path, run: Run, wanted: str) -> None:
    if found != wanted:
        raise InputError(
            f"{folder}: is of another encoder ({found[:12]}) than the one whose latents {run.folder} was trained on "
            f"({wanted[:12]}); give the folder of the latents that you mean."
        )


def _default_out(source: Path, run: Run | None) -> Path:
    """`analysis` in the run; not in a folder of latents, which `decovae encode` refuses with other files in it."""
    if run is not None:
        return source / "analysis"
    owner = source.resolve().parent
    if source.resolve().name == "latents" and (owner / "config.yaml").is_file():
        return source.parent / "analysis"
    return source.with_name(f"{source.resolve().name}-analysis")


def _write(analysis: Analysis, out: Path) -> None:
    from decovae.evaluation.analysis import write_analysis
    from decovae.evaluation.figures import draw_cosine, draw_tsne, draw_variance, png
    from decovae.files import write_atomically

    models = {analysis.run if analysis.deco is None else f"{analysis.run}, {analysis.deco}": analysis}
    pictures = {
        "cosine.png": (draw_cosine, "Absolute cosine similarity of the channels"),
        "variance.png": (draw_variance, "Explained variance of the principal components"),
        "tsne.png": (draw_tsne, "t-SNE of latent codes"),
    }
    try:
        for name, (draw, title) in pictures.items():
            content = png(draw(models), title=f"{title}: {analysis.run}, {analysis.data}")
            write_atomically(out / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
        write_analysis(analysis, out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); give another folder.") from error


def summary(analysis: Analysis, store: LatentStore, out: Path) -> Iterator[str]:
    """Lines on an analysis: Table 1's figures, the channels, and where the files are."""
    yield (
        f"{analysis.run}: {analysis.latents} latents ({analysis.split}) of {store.folder}, {analysis.codes:,} codes of "
        f"{analysis.channels} channels."
    )
    yield f"  data: {analysis.data}"
    yield (
        f"  mean |cosine| {analysis.cosine_similarity:.4f}, mean |Pearson| {analysis.pearson:.4f}, effective rank "
        f"{analysis.effective_rank:.3f} of {analysis.channels}"
    )
    yield "  explained variance " + " ".join(f"{share:.1%}" for share in analysis.explained_variance)
    yield "  channel variance " + " ".join(f"{value:.4g}" for value in analysis.channel_variance)
    yield f"  written to {out}"
