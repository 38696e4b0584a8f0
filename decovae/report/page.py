"""The report: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import decovae
from decovae.files import write_atomically
from decovae.report import facts, honesty, measures
from decovae.report.charts import legend
from decovae.report.curves import CURVES, colour, training_charts
from decovae.report.images import MOST_DIFFERENCE, difference_scale
from decovae.report.models import Model, generates, without_further_seeds
from decovae.report.pictures import comparisons, latent_figures, sample_rows
from decovae.report.tables import PaperTable, study_tables
from decovae.report.viewer import build_viewer

TITLE = "DeCo-VAE report"

MEGABYTE = 1_000_000


def write_report(models: Sequence[Model], path: Path, *, title: str = TITLE, expected: Sequence[str] = ()) -> int:
    """Write the page, whole or not at all.

    Args:
        models: at least one, see `decovae.report.collect.collect`.
        path: of the HTML file.
        title: heading and window title.
        expected: decorrelation losses of models that will be there, see `decovae.report.tables.study_tables`.

    Returns:
        The file's size in bytes.

    Raises:
        InputError: a volume or an analysis cannot be read.
        OSError: the file cannot be written.
    """
    content = render(models, title=title, expected=expected).encode()
    write_atomically(path, lambda file: file.write(content))
    return len(content)


def render(models: Sequence[Model], *, title: str = TITLE, expected: Sequence[str] = ()) -> str:
    """The page as text.

    Every text from runs and files is escaped; scripts are allowed by their hash alone, and the page itself forbids its
    browser any request. Autoencoders that are there for their latents alone, further seeds of a whole model, are
    counted in the tables and shown nowhere else.

    Args and errors as in `write_report`.
    """
    tables, models = study_tables(models, expected=expected), without_further_seeds(models)
    environment = Environment(
        loader=PackageLoader("decovae.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    viewer = build_viewer(models)
    script = environment.loader.get_source(environment, "viewer.js")[0] if environment.loader else ""
    style = environment.loader.get_source(environment, "report.css")[0] if environment.loader else ""
    return environment.get_template("report.html").render(
        title=title,
        date=datetime.date.today().isoformat(),
        version=decovae.__version__,
        models=models,
        generation=generates(models),
        style=Markup(style),
        script=Markup(script),
        script_hash=_hash(script),
        viewer=viewer,
        **_run_context(models),
        **_result_context(models, tables),
    )


def _run_context(models: Sequence[Model]) -> dict[str, Any]:
    return {
        "data": honesty.data_sentences(models),
        "simulated": any(model.template_cohort for model in models),
        "run_table": facts.run_table(models),
        "machines": facts.machines(models),
        "configurations": facts.configurations(models),
        "training": {
            facts.STAGE_NAMES[stage]: training_charts(models, stage)
            for stage in CURVES
            if stage != "flow" or generates(models)
        },
        "legend": legend((model.name, colour(place), place) for place, model in enumerate(models)),
        "speed_table": facts.speed_table(models),
        "study_tables": facts.study_tables(models),
        "cost_table": facts.cost_table(models),
        "proxies": honesty.proxies(models),
        "genuine": honesty.genuine(models),
        "missing": honesty.missing(models),
    }


def _result_context(models: Sequence[Model], tables: Sequence[PaperTable]) -> dict[str, Any]:
    samples, samples_caption = sample_rows(models)
    # Where nothing was generated the page says so once; Table 3 is not missing besides.
    empty = [table.number for table in tables if table.empty and (table.number != 3 or generates(models))]
    shared = Counter(note for table in tables if not table.empty for note in table.notes)
    return {
        "paper_tables": tables,
        "empty_tables": {
            command: numbers
            for command, chosen in (("decovae analyze RUN", (1,)), ("decovae evaluate RUN", (2, 3, 4, 5)))
            if (numbers := [number for number in empty if number in chosen])
        },
        "paper_notes": [note for note, times in shared.items() if times > 1],
        "reconstruction_table": measures.reconstruction_table(models),
        "frechet_tables": measures.frechet_tables(models),
        "frechet_notes": measures.frechet_notes(models),
        "latent_figures": latent_figures(models),
        "comparisons": comparisons(models),
        "difference_scale": difference_scale(),
        "most_difference": MOST_DIFFERENCE,
        "samples": samples,
        "samples_caption": samples_caption,
        "tissue_charts": measures.tissue_charts(models),
        "tissue_methods": measures.tissue_methods(models),
        "fidelity_table": measures.fidelity_table(models),
        "memorisation": measures.memorisation_chart(models),
        "memorisation_verdicts": measures.memorisation_verdicts(models),
        "memorisation_space": measures.memorisation_space(models),
    }


def _hash(script: str) -> str:
    """What a content security policy calls an inline script by."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
