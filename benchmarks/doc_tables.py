"""Writes tables into pages of the documentation, from committed files of results."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- end of table -->"


def write_table(page: str, name: str, table: str) -> None:
    """Replace the text between the markers `<!-- table: NAME -->` and `<!-- end of table -->` of a page in `docs`.

    Raises:
        `ValueError`: If the page does not have the markers.
    """
    file = DOCS / page
    start = f"<!-- table: {name} -->"
    text = file.read_text(encoding="utf-8")
    before, found, rest = text.partition(start)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{file} must have the markers `{start}` and `{END}`. Put both where the table belongs.")
    file.write_text(f"{before}{start}\n\n{table}\n\n{END}{after}", encoding="utf-8")
