"""Tables of text: every layout holds the same cells, and no name breaks the text around it."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET

from hf_lowrank.text_tables import WRITERS, Table, in_notebook

ODD = "a|b<c>&[red]"
TABLE = Table(
    f"Scores of {ODD}",
    ["task", ODD, "dense"],
    [["m1", "0.1000", "0.2000"], ["<script>x</script>", "0.3000", "-"], ["", "", ""]],
    best=frozenset({(0, 1), (1, 1), (2, 2)}),
    note=f"Below: {ODD}",
)


def test_every_layout_holds_the_same_cells() -> None:
    assert [*csv.reader(io.StringIO(WRITERS["csv"](TABLE)))] == [TABLE.headings, *TABLE.rows]
    root = ET.fromstring(f"<div>{in_notebook(TABLE, TABLE)}</div>")
    assert len(root.findall("table")) == 2
    for table in root.iter("table"):
        assert [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")] == [
            TABLE.headings,
            *TABLE.rows,
        ]
        assert table.find("caption").text == TABLE.title
    assert [note.text for note in root.iter("p")] == [TABLE.note] * 2
    lines = WRITERS["markdown"](TABLE).splitlines()
    assert lines[2:6] == [
        r"| task | a\|b<c>&[red] | dense |",
        "|---|---:|---:|",
        "| m1 | **0.1000** | 0.2000 |",
        "| <script>x</script> | **0.3000** | - |",
    ]
    assert lines[-1] == TABLE.note


def test_the_best_are_marked_and_numbers_are_at_the_right() -> None:
    root = ET.fromstring(f"<div>{in_notebook(TABLE)}</div>")
    assert [cell.text for cell in root.iter("b")] == ["0.1000", "0.3000"]  # an empty cell has nothing to mark
    for row in root.iter("tr"):
        assert [cell.get("style").removeprefix("text-align:") for cell in row] == ["left", "right", "right"]


def test_a_notebook_has_its_own_colours() -> None:
    assert "color" not in in_notebook(TABLE)
    assert "background" not in in_notebook(TABLE)
