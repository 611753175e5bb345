"""Tables of text as people read them: in Markdown, HTML (so in a notebook) or CSV."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["WRITERS", "Table", "in_notebook"]


@dataclass(frozen=True)
class Table:
    """Cells of text.

    Attributes:
        title: What stands above it, without a full stop.
        headings, rows: A heading for each column, and as many cells in every row.
        best: The (row, column) of the cells that are marked.
        num_texts: How many columns, the first ones, hold text; those after them hold numbers and are aligned to the right.
        note: What stands below it, if anything.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    num_texts: int = 1
    note: str = ""


def in_notebook(*tables: Table) -> str:
    """The tables as a notebook shows them: in its own style and colours, light or dark."""
    return "\n".join(map(_html, tables))


def _marked(table: Table, escape: Callable[[str], str], before: str, after: str) -> list[list[str]]:
    """The rows as another language has them, the best cells between two marks."""
    return [
        [
            f"{before}{escape(cell)}{after}" if cell and (i, j) in table.best else escape(cell)
            for j, cell in enumerate(row)
        ]
        for i, row in enumerate(table.rows)
    ]


def _markdown(table: Table) -> str:
    def escape(cell: str) -> str:
        return cell.replace("|", "\\|")

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    rule = "|---" * table.num_texts + "|---:" * (len(table.headings) - table.num_texts) + "|"
    rows = map(line, _marked(table, escape, "**", "**"))
    note = ["", table.note] if table.note else []
    return "\n".join([f"{table.title}:", "", line(map(escape, table.headings)), rule, *rows, *note, ""])


def _html(table: Table) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        sides = ("left" if i < table.num_texts else "right" for i in range(len(table.headings)))
        row = (f'<{tag} style="text-align:{side}">{cell}</{tag}>' for cell, side in zip(cells, sides))
        return f"<tr>{''.join(row)}</tr>"

    lines = [
        "<table>",
        f'<caption style="text-align:left">{html.escape(table.title)}</caption>',
        f"<thead>{line(map(html.escape, table.headings), 'th')}</thead>",
        "<tbody>",
        *(line(row, "td") for row in _marked(table, html.escape, "<b>", "</b>")),
        "</tbody>",
        "</table>",
        *([f"<p>{html.escape(table.note)}</p>"] if table.note else []),
    ]
    return "\n".join([*lines, ""])


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.headings)
    writer.writerows(table.rows)
    return text.getvalue()


WRITERS = {"markdown": _markdown, "html": _html, "csv": _csv}
