"""The README's results, written from a study's output: python -m bench.results_section [STUDY.json] [--check]

STUDY.json is the ``study.json`` of a folder of `decovae study`, by default the one in bench/results/. The text between
the README's two markers is replaced; with --check it is compared, and the exit code says whether it is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decovae.report.table_text import markdown
from decovae.report.tables import PaperTable

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "bench" / "results" / "study-quickstart-cpu.json"
BEGIN, END = "<!-- results: begin (written by python -m bench.results_section) -->", "<!-- results: end -->"


def section(study: Mapping[str, Any], *, name: str) -> str:
    """The Markdown of a study's results: what ran where and when, and its tables.

    Args:
        study: the content of a ``study.json``.
        name: of the file, from the repository's root.
    """
    tables = [PaperTable.from_dict(entry) for entry in study["tables"]]
    machine, steps = study["machine"], study["steps"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['torch_threads']} threads"
    head = (
        f"`decovae study {study['plan']}` on the {', '.join(study['data'])}: "
        f"{study['date']}, {where}, {study['seconds'] / 60:.0f} minutes in all. Autoencoders are trained for "
        f"{steps['vae']} steps, decoders tuned for {steps['decoder']}, flows trained for {steps['flow']}, and "
        f"{study['samples']} volumes sampled from each. Beside each figure stands the paper's; all of it comes from "
        f"[{name}]({name}), written by that command."
    )
    of: dict[str, list[str]] = {}
    for table in tables:
        for note in table.notes:
            of.setdefault(note, []).append(str(table.number))
    notes = [
        f"- {note}" if len(numbers) == len(tables) else f"- Table{'s'[: len(numbers) > 1]} {', '.join(numbers)}: {note}"
        for note, numbers in of.items()
    ]
    return "\n".join([head, "", *(markdown(table, notes=False) for table in tables), *notes, ""])


def replaced(readme: str, text: str) -> str:
    """The README with another text between its markers.

    Raises:
        ValueError: it has no markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no {BEGIN!r} … {END!r}")
    return f"{before}{BEGIN}\n{text}{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=STUDY)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    study = json.loads(arguments.study.read_text(encoding="utf-8"))
    path = ROOT / "README.md"
    found = path.read_text(encoding="utf-8")
    given = arguments.study.resolve()
    if not given.is_relative_to(ROOT):
        parser.error(f"{arguments.study} lies outside {ROOT}: copy it to bench/results, where the README can name it")
    text = replaced(found, section(study, name=str(given.relative_to(ROOT))))
    if arguments.check:
        return int(text != found)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
