"""The tables of the README and of the cards that say how accurate compressed models are, made again by the commands that stand beside them.

    python examples/results.py                      # all of them: hours on two cores
    python examples/results.py budgets-reference    # one
    python examples/results.py --check              # only say what differs

A table stands below the comment `<!-- results: NAME -->`. What commands have written is kept in a folder, and they are not run again where
it is there. At the end every cell that has changed is said.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "model_cards").glob("*.md")))
Rows = list[list[str]]


@dataclass(frozen=True)
class Workplace:
    """Where the outputs of commands are."""

    folder: Path

    def run(self, name: str, *arguments: str) -> dict[str, Any]:
        """The JSON that a command of hf-lowrank writes, run in the folder unless that is there."""
        output = self.folder / f"{name}.json"
        if not output.exists():
            print(f"hf-lowrank {shlex.join(arguments)}", file=sys.stderr)
            subprocess.run(
                [sys.executable, "-m", "hf_lowrank", *arguments, "--json", f"{name}.new.json"],
                cwd=self.folder,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            (self.folder / f"{name}.new.json").replace(output)
        return json.loads(output.read_text())

    def compressed(self, source: str, *rule: str) -> tuple[str, dict[str, Any]]:
        """A compressed model's folder, and what `compress` says of it."""
        name = "-".join([source, *(word.strip("-") for word in rule)])
        return name, self.run(name, "compress", source, name, *rule, "--overwrite")

    def scores(self, against: str, *models: str) -> dict[str, dict[str, Any]]:
        """The means of models on the 42 tasks, by model: what `evaluate` calls `aggregate`."""
        arguments = ["evaluate", *models, "--against", against, "--cache", "cells"]
        return self.run("-".join(["scores", *models]), *arguments)["aggregate"]


def interval(mean: dict[str, float]) -> str:
    return f"{mean['geometric_mean']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})"


def relative(found: dict[str, Any], *metrics: str) -> list[str]:
    """Scores relative to the dense model's."""
    return [interval(found["relative_to_dense"][metric]) for metric in metrics]


# ---- The tables ------------------------------------------------------------------------------------------------------

SHARES = {
    "0.5": "half of attention and feed-forward (`total_ratio=0.5`)",
    "0.25": "a quarter of both",
    "0.15": "0.15 of both",
}


def budgets(source: str, *more: tuple[str, ...]) -> Callable[[Workplace], Rows]:
    """A model compressed to several shares of its layers."""

    def rows(work: Workplace) -> Rows:
        rules = {("--total-ratio", share): text for share, text in SHARES.items()}
        rules |= {rule[1:]: rule[0] for rule in more}
        models = {rule: work.compressed(source, *rule) for rule in rules}
        scores = work.scores(source, *(name for name, _ in models.values()))
        return [["kept", "of the whole model", "WQL", "MASE", "WQL, of Seasonal Naive's"]] + [
            [
                rules[rule],
                f"{said['parameters'] / said['dense_parameters']:.2f}",
                *relative(scores[name], "WQL", "MASE"),
                f"{scores[name]['relative_to_seasonal_naive']['WQL']['geometric_mean']:.3f}",
            ]
            for rule, (name, said) in models.items()
        ]

    return rows


def bounds(work: Workplace) -> Rows:
    """The smallest models that lose at most one in a hundred."""
    rows = [
        ["", "kept of the layers", "of the whole model", "expected loss added (bound)", "WQL on the 42 tasks", "MASE"]
    ]
    for source in ("reference-bolt", "reference-2", "reference"):
        name, said = work.compressed(source, "--max-loss", "0.01")
        loss = said["compression"]["measured_loss"]
        rows.append(
            [
                f"`{source}`",
                f"{loss['total_ratio']:.3f}",
                f"{said['parameters'] / said['dense_parameters']:.2f}",
                f"{loss['loss']:.4f} ({loss['bound']:.4f})",
                *relative(work.scores(source, name)[name], "WQL", "MASE"),
            ]
        )
    return rows


def recovery(work: Workplace) -> Rows:
    """Models of 0.08 of their layers, before and after a distillation."""
    rows = [["", "steps", "compressed", "recovered", "won back"]]
    for source in ("reference", "reference-2", "reference-bolt"):
        small, _ = work.compressed(source, "--total-ratio", "0.08")
        recovered = f"{small}-recovered"
        said = work.run(recovered, "recover", small, recovered, "--teacher", source, "--overwrite")["recovery"]
        scores = work.scores(source, small, recovered)
        lost, left = (scores[name]["relative_to_dense"]["WQL"]["geometric_mean"] - 1 for name in (small, recovered))
        rows.append(
            [
                f"`{source}`",
                f"{said['best_step']:,}",
                *(relative(scores[name], "WQL")[0] for name in (small, recovered)),
                "all" if left <= 0 else f"{1 - left / lost:.0%}",
            ]
        )
    return rows


def integers(work: Workplace) -> Rows:
    """Models of a quarter of their layers, in integers."""
    rows = [["", "int8: WQL", "MiB, of those in bfloat16", "int4: WQL", "MiB"]]
    rule = ("--total-ratio", "0.25")
    for source in ("reference-bolt", "reference-2", "reference"):
        plain, before = work.compressed(source, *rule)
        row = [f"`{source}`"]
        for kind in ("int8", "int4"):
            name, said = work.compressed(source, *rule, "--quantize", kind)
            size, of = (f"{one['bytes'] / 2**20:.1f}" for one in (said, before))
            row += [relative(work.scores(plain, name)[name], "WQL")[0], f"{size} of {of}" if kind == "int8" else size]
        rows.append(row)
    return rows


def sweep(work: Workplace) -> Rows:
    """The README's table, and its picture."""
    arguments = ["--methods", "default,paper", "--ratios", "0.5,0.25,0.15,0.075,0.05", "--cache", "cells"]
    picture = ROOT / "model_cards" / "reference-bolt-sweep.png"
    found = work.run("sweep", "sweep", "reference-bolt", *arguments, "--plot", str(picture))
    points = {(point["value"], point["method"]): point for point in found["points"]}
    return [["share of the attention", "WQL", "MASE", "the paper's: WQL", "the paper's: MASE"]] + [
        [
            f"{share:g}",
            *(
                "{:.3f} ({:.3f} to {:.3f})".format(*points[share, method][metric])
                for method in ("default", "paper")
                for metric in ("wql", "mase")
            ),
        ]
        for share in dict.fromkeys(value for value, _ in points)
    ]


TABLES: dict[str, Callable[[Workplace], Rows]] = {
    "sweep": sweep,
    "budgets-reference": budgets("reference"),
    "budgets-reference-bolt": budgets("reference-bolt", ("0.15 of the attention (`ratio=0.15`)", "--ratio", "0.15")),
    "budgets-reference-2": budgets("reference-2"),
    "bounds": bounds,
    "recovery": recovery,
    "integers": integers,
}


# ---- In their places -------------------------------------------------------------------------------------------------


def table_lines(rows: Rows) -> list[str]:
    rule = "|---" * len(rows[0]) + "|"
    first, *others = (f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    return [first, rule, *others]


def place(text: str, name: str) -> tuple[int, int] | None:
    """Of a table in the lines of a document: the first and the one behind its last; None where it is not."""
    lines = text.split("\n")
    marker = f"<!-- results: {name} -->"
    if marker not in lines:
        return None
    first = lines.index(marker) + 1
    while not lines[first].strip():
        first += 1
    last = first
    while last < len(lines) and lines[last].startswith("|"):
        last += 1
    return first, last


def changes(old: list[str], new: list[str]) -> Iterator[str]:
    """What is said of every cell that is another one."""
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in lines] for lines in (old, new)]
    headings = cells[1][0]
    before = {row[0]: row for row in cells[0][2:]}
    for row in cells[1][2:]:
        was = before.get(row[0])
        if was is None or cells[0][0] != headings:
            yield f"{row[0] or 'a row'}: new"
            continue
        yield from (f"{row[0]}, {name}: {a} -> {b}" for name, a, b in zip(headings, was, row) if a != b)
    kept = {row[0] for row in cells[1][2:]}
    yield from (f"{name}: gone" for name in before if name not in kept)


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(TABLES)}; default: all.")] = None,
    folder: Annotated[Path, typer.Option(help="What commands write is kept here.")] = Path("runs/results"),
    check: Annotated[bool, typer.Option("--check", help="Change no document.")] = False,
) -> None:
    """Make tables again, put them in their places, and say what has changed."""
    if unknown := set(names or ()) - set(TABLES):
        raise typer.BadParameter(f"there are {', '.join(TABLES)}; found {', '.join(sorted(unknown))}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or TABLES:
        new = table_lines(TABLES[name](Workplace(folder.resolve())))
        for document in DOCUMENTS:
            text = document.read_text(encoding="utf-8")
            if (found := place(text, name)) is None:
                continue
            lines, (first, last) = text.split("\n"), found
            for change in changes(lines[first:last], new):
                print(f"{document.name}, {name}: {change}")
            if not check and lines[first:last] != new:
                document.write_text("\n".join([*lines[:first], *new, *lines[last:]]), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
