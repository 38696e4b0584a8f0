"""A table as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from decovae.files import write_text
from decovae.report.tables import Cell, Column, Mark, PaperTable

MISSING = "–"

LATEX_SPECIAL = {
    "\\": r"\textbackslash{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "±": r"$\pm$",
    "–": "--",
}
"""Signs that LaTeX reads as commands, or that its fonts lack."""


def caption(table: PaperTable) -> str:
    """Number, title and how to read a cell."""
    return f"Table {table.number}. {table.title}; ours (the paper's)."


def markdown(table: PaperTable, *, notes: bool = True) -> str:
    """A GitHub table with its caption above and its notes below; best in bold, second-best in italics."""
    lines = [f"**{caption(table)}**", ""]
    if table.empty:
        return "\n".join([*lines, "Not measured.", ""])
    styles: dict[Mark | None, Callable[[str], str]] = {
        "best": lambda text: f"**{text}**",
        "second": lambda text: f"*{text}*",
        None: str,
    }
    lines.append("| model | " + " | ".join(column.heading for column in table.columns) + " |")
    lines.append("|---" * (len(table.columns) + 1) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in _rows(table, styles, "{ours} ({paper})")]
    below = [f"- {note}" for note in _notes(table)] if notes else []
    return "\n".join([*lines, "", *below, *([""] if below else [])])


def latex(table: PaperTable) -> str:
    r"""A `table` of booktabs' rules; best in bold, second-best underlined, as in the paper."""
    columns = " & ".join(escape_latex(column.heading) for column in table.columns)
    styles: dict[Mark | None, Callable[[str], str]] = {
        "best": lambda text: rf"\textbf{{{text}}}",
        "second": lambda text: rf"\underline{{{text}}}",
        None: str,
    }
    body = [" & ".join(row) + r" \\" for row in _rows(table, styles, r"{ours} {{\scriptsize ({paper})}}", escape_latex)]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"\caption{" + escape_latex(" ".join([caption(table), *_notes(table)])) + "}",
            r"\begin{tabular}{l" + "r" * len(table.columns) + "}",
            r"\toprule",
            rf"Model & {columns} \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def comma_separated(table: PaperTable) -> str:
    """A row a model: for each column our mean, our standard deviation over seeds, and the paper's value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [column.label for column in table.columns]
    writer.writerow(["model", *(f"{name}{part}" for name in names for part in ("", " sd", " paper"))])
    for row in table.rows:
        cells: list[float | str] = []
        for cell, paper in zip(row.ours, row.paper, strict=True):
            cells += ["" if cell is None else cell.mean, _deviation(cell), "" if paper is None else paper]
        writer.writerow([row.label, *cells])
    return text.getvalue()


def escape_latex(text: str) -> str:
    """The text with every sign that LaTeX would read as a command made one that it prints."""
    return "".join(LATEX_SPECIAL.get(sign, sign) for sign in text)


def _deviation(cell: Cell | None) -> float | str:
    import statistics

    return statistics.stdev(cell.values) if cell is not None and len(cell.values) > 1 else ""


def _notes(table: PaperTable) -> list[str]:
    unpaired = any(paper is None for row in table.rows for paper in row.paper)
    return [*table.notes, *(["– : not measured, or not in the paper."] if unpaired or _gaps(table) else [])]


def _gaps(table: PaperTable) -> bool:
    return any(cell is None for row in table.rows for cell in row.ours)


def _rows(
    table: PaperTable,
    styles: dict[Mark | None, Callable[[str], str]],
    form: str,
    escape: Callable[[str], str] = str,
) -> Sequence[list[str]]:
    marks = [table.marks(place) for place in range(len(table.columns))]

    def shown(number: int, place: int, column: Column, cell: Cell | None, paper: float | None) -> str:
        ours = MISSING if cell is None else cell.shown(column.digits)
        theirs = MISSING if paper is None else f"{paper:.{column.paper_digits}f}"
        return form.format(ours=styles[marks[place].get(number)](escape(ours)), paper=escape(theirs))

    return [
        [
            escape(row.label),
            *(
                shown(number, place, column, cell, paper)
                for place, (column, cell, paper) in enumerate(zip(table.columns, row.ours, row.paper, strict=True))
            ),
        ]
        for number, row in enumerate(table.rows)
    ]


def write_tables(tables: Sequence[PaperTable], folder: Path) -> None:
    """Each table that is not empty as ``table1.md``, ``.tex`` and ``.csv`` in a folder, each file whole or not at all.

    Raises:
        OSError: a file cannot be written.
    """
    forms = {".md": markdown, ".tex": latex, ".csv": comma_separated}
    for table in tables:
        if table.empty:
            continue
        for suffix, form in forms.items():
            write_text(folder / f"table{table.number}{suffix}", form(table))
