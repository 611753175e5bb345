"""What all commands have in common: `--json FILE`, and errors before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hf_lowrank.cli.app import COMMANDS, app
from hf_lowrank.cli.options import check_file, numbers
from hf_lowrank.cli.output import plain_messages, write_json

NAMES = [command.__name__ for command in COMMANDS]
# What a command cannot do without; none of it exists.
ARGUMENTS = {
    "compress": ["dense", "small"],
    "recover": ["small", "tuned", "--teacher", "dense"],
    "evaluate": ["small"],
    "pretrain": ["new"],
    "forecast": ["small", "in.csv", "out.csv"],
    "export": ["small", "out"],
    "bench": ["small", "--against", "dense"],
    "push": ["small", "ann/small"],
    "publish": ["dense"],
    "sweep": ["dense"],
    "analyze": ["small"],
}


def run(*arguments: object, application: typer.Typer = app) -> tuple[int, str, str]:
    result = CliRunner().invoke(application, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def application() -> typer.Typer:
    """One command that works at once."""
    one = typer.Typer()

    @one.command()
    def add(first: int, second: int, json_file: Path | None = typer.Option(None, "--json")) -> None:
        with plain_messages(json_file) as console:
            write_json(json_file, {"sum": first + second})
            console.print(f"The sum is {first + second}.")

    return one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("file", ["no/such/figures.json", "figures.txt", "figures", "folder.json"])
def test_a_file_that_cannot_be_written_is_an_error_before_the_work(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    code, out, err = run(name, *ARGUMENTS.get(name, []), "--json", file)
    assert (code, out) == (1, "")
    assert err == (
        "error: --json must be a .json file in a folder that exists, or - for standard output, " + f"found {file!r}.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


def test_standard_output_holds_json_alone(application: typer.Typer) -> None:
    code, out, _ = run(2, 3, "--json", "-", application=application)
    assert code == 0
    assert json.loads(out) == {"sum": 5}


def test_a_file_is_written_and_the_tables_are_shown(application: typer.Typer, tmp_path: Path) -> None:
    file = tmp_path / "sum.json"
    for _ in range(2):  # the second run replaces what the first has written
        code, out, _ = run(2, 3, "--json", file, application=application)
        assert (code, out) == (0, "The sum is 5.\n")
        assert json.loads(file.read_text()) == {"sum": 5}
        assert list(tmp_path.iterdir()) == [file]
    assert run(2, 3, application=application)[1] == "The sum is 5.\n"


def test_compress_writes_to_a_file_what_it_writes_to_standard_output(chronos_t5: Any, tmp_path: Path) -> None:
    chronos_t5.save_pretrained(tmp_path / "dense")
    command = ["compress", tmp_path / "dense", tmp_path / "small", "--uniform", "3", "--calibration", "none"]
    _, printed, _ = run(*command, "--json", "-")
    code, tables, _ = run(*command, "--overwrite", "--json", tmp_path / "summary.json")
    assert code == 0
    assert (tmp_path / "summary.json").read_text() == printed
    assert "qk 3/8" in tables


def test_the_list_of_tasks_is_a_table_or_json() -> None:
    code, out, _ = run("evaluate", "--list", "--json", "-")
    assert code == 0
    groups = json.loads(out)
    names = [task["name"] for tasks in groups.values() for task in tasks]
    for columns in (None, "80"):  # in a pipe, and in the narrowest terminal
        shown = CliRunner(env={"COLUMNS": columns}).invoke(app, ["evaluate", "--list"]).stdout
        assert all(f" {name} " in shown for name in names)
    assert {group: len(tasks) for group, tasks in groups.items()}["m1_yearly"] == 1
    for tasks in groups.values():
        assert all(task["horizon"] >= 1 for task in tasks)


def test_a_csv_file_that_cannot_be_written_is_an_error_before_the_work() -> None:
    code, _, err = run("evaluate", "small", "--csv", "figures.json")
    assert code == 1
    assert "--csv must be a .csv file in a folder that exists, found 'figures.json'" in err


def test_files_are_checked_by_suffix_and_folder(tmp_path: Path) -> None:
    check_file("--csv", tmp_path / "new.csv", ".csv")
    for path in (tmp_path / "new.json", tmp_path, tmp_path / "no" / "new.csv"):
        with pytest.raises(ValueError, match=r"^--csv must be a \.csv file in a folder that exists, found '"):
            check_file("--csv", path, ".csv")


def test_lists_of_numbers_are_read() -> None:
    assert numbers("--ratios", "0.5,1e-2", "0.5,0.25") == [0.5, 0.01]
    with pytest.raises(ValueError, match=r"--ratios must be numbers such as 0\.5,0\.25, found '0\.5;0\.2'"):
        numbers("--ratios", "0.5;0.2", "0.5,0.25")
