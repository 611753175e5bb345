"""Options that several commands have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..data.group_columns import GroupColumns

__all__ = [
    "CHECKPOINT",
    "RANKS_WANTED",
    "STANDARD_OUTPUT",
    "Device",
    "IdColumn",
    "KnownCovariates",
    "PastCovariates",
    "TargetColumns",
    "TimestampColumn",
    "check_data",
    "check_file",
    "columns_of",
    "integers",
    "json_object",
    "json_option",
    "numbers",
    "with_columns",
]

CHECKPOINT = "Hub id, folder, 'reference', 'reference-bolt' or 'reference-2'"
STANDARD_OUTPUT = Path("-")
RANKS_WANTED = 'ranks, such as {"cross": [{"qk": 8, "vo": 8}, ...]}'
Device = Annotated[str | None, typer.Option(help="Such as 'cpu' or 'cuda'; default the GPU if there is one.")]
# Of a file in long format.
IdColumn = Annotated[str, typer.Option("--id-column", help="The column that names the series.")]
TimestampColumn = Annotated[str, typer.Option("--timestamp-column", help="The column of the times.")]
# Of one whose items are groups of series.
TargetColumns = Annotated[
    list[str] | None,
    typer.Option("--target", help="A column of values; may be repeated. Default: target."),
]
PastCovariates = Annotated[
    list[str] | None,
    typer.Option("--past-covariates", help="For Chronos-2: a column that is known until now; may be repeated."),
]
KnownCovariates = Annotated[
    list[str] | None,
    typer.Option(
        "--known-covariates", help="For Chronos-2: a column that is known in the future as well; may be repeated."
    ),
]


def json_option(content: str) -> Any:
    """`--json FILE`, the same in every command; `content` is what it writes."""
    return typer.Option("--json", metavar="FILE", help=f"Write {content} as JSON to this file; - is standard output.")


def check_file(option: str, path: Path, *suffixes: str, otherwise: str = "") -> None:
    """Raise ValueError where a file of one of these suffixes cannot be written; for a check before long work.

    Args:
        option: What the message calls the file, such as `--csv`.
        otherwise: What else the option may be, for the message.
    """
    if path.suffix not in suffixes or path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(
            f"{option} must be a {', '.join(suffixes)} file in a folder that exists{otherwise}, found {str(path)!r}."
        )


def check_data(option: str, name: str, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError where an option is neither 'synthetic', 'none' nor a file that ends like one of these."""
    if name not in ("synthetic", "none") and not name.endswith(suffixes):
        raise ValueError(
            f"{option} must be 'synthetic', 'none' or a file that ends in {', '.join(suffixes)}, found {name!r}."
        )


def columns_of(
    target: list[str] | None,
    past_covariates: list[str] | None,
    known_covariates: list[str] | None,
    id_column: str,
    timestamp_column: str,
) -> GroupColumns:
    """What these options say of the columns of a file; `GroupColumns()` where none is given."""
    from ..data.group_columns import GroupColumns

    given = tuple(target or GroupColumns.targets), tuple(past_covariates or ()), tuple(known_covariates or ())
    return GroupColumns(id_column, timestamp_column, *given)


def with_columns(option: str, data: Any, columns: GroupColumns) -> Any:
    """What an option of data says where others name columns: itself where none does, or the series or groups of the file.

    Raises:
        ValueError: Columns are named, and there is no file; or the file has no such columns.
    """
    from ..data.group_columns import GroupColumns
    from ..data.groups import GroupedSeries
    from ..data.series import read_series

    if columns == GroupColumns():
        return data
    if str(data) in ("synthetic", "none") or str(data).endswith(".safetensors"):
        raise ValueError(
            "--id-column, --timestamp-column, --target, --past-covariates and --known-covariates are of a file of series; "
            f"{option} is {str(data)!r}."
        )
    if len(columns.targets) == 1 and not columns.covariates:
        return read_series(data, columns.long(columns.targets[0]))
    return GroupedSeries(data, **columns.arguments)


def json_object(option: str, path: Path, wanted: str) -> dict[str, Any]:
    """The JSON of a file that an option names; ValueError, with what is wanted in it, where it is no table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{option} must be a JSON file of {wanted}, found {str(path)!r} ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{option} must be a JSON file of {wanted}; {str(path)!r} holds a {type(content).__name__}.")
    return content


def numbers(option: str, text: str, example: str) -> list[float]:
    """The numbers of an option that takes "0.5,0.25"; ValueError, with an example of what is right, where it has others."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers such as {example}, found {text!r}.") from None


def integers(name: str, values: Iterable[str]) -> list[int]:
    """The numbers of a command-line option that takes "1,8" and may be repeated."""
    items = [item for value in values for item in value.split(",")]
    try:
        return [int(item) for item in items]
    except ValueError:
        raise ValueError(f"{name} must be integers separated by commas, found {','.join(items)!r}.") from None
