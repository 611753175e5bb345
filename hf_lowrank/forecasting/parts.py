"""The finished parts of a forecast in a folder beside its output, so that a run that was cut off can go on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..unfinished import UnfinishedRun
from .long_file import Contents, import_pyarrow

__all__ = ["Parts", "run_beside"]

MANIFEST = "manifest.json"
MICROSECONDS_OF_A_DAY = 86_400 * 10**6


def run_beside(output: Path) -> UnfinishedRun:
    """The run in `OUTPUT.parts`, which may be unfinished."""
    return UnfinishedRun.beside(output, "parts", MANIFEST)


@dataclass(frozen=True)
class Parts:
    """The unfinished run in `OUTPUT.parts`: its record, and a parquet file for each finished table.

    Every file appears whole or not at all. `schema` is that of the forecasts in arrow's words.
    """

    output: Path
    schema: Any

    @property
    def unfinished_run(self) -> UnfinishedRun:
        """The folder and its record."""
        return run_beside(self.output)

    @property
    def folder(self) -> Path:
        """`OUTPUT.parts`."""
        return self.unfinished_run.folder

    def unfinished(self, record: Mapping[str, Any], *, resume: bool) -> Contents | None:
        """What the input holds, as an unfinished run with the same record has seen it; None where there is no such run.

        Raises:
            FileExistsError, ValueError: See `UnfinishedRun.recorded`.
        """
        recorded = self.unfinished_run.recorded(record, resume=resume)
        if recorded is None:
            return None
        try:
            return Contents(**recorded["contents"])
        except (KeyError, TypeError) as error:
            raise self.unfinished_run.foreign(f"its contents: {error}") from None

    def begin(self, record: Mapping[str, Any], contents: Contents) -> None:
        """Make the folder, in place of one that `unfinished` has looked at."""
        self.unfinished_run.begin({**record, "contents": asdict(contents)})

    def path(self, number: int) -> Path:
        """The file of a finished part."""
        return self.folder / f"part-{number:06d}.parquet"

    def num_rows(self, number: int) -> int | None:
        """The rows of a finished part; None where it is missing or damaged, as a loss of power may leave it."""
        try:
            return import_pyarrow().parquet.read_metadata(self.path(number)).num_rows
        except (OSError, ValueError):
            return None

    def write(self, number: int, forecasts: pd.DataFrame) -> None:
        """Write a finished part, a table of `forecast_series`."""
        pa = import_pyarrow()
        table = pa.Table.from_pandas(forecasts, schema=self.schema, preserve_index=False, safe=False)
        growing = self.folder / "unfinished"
        pa.parquet.write_table(table, growing)
        os.replace(growing, self.path(number))

    def how_to_go_on(self) -> str | None:
        """What an interrupted run is told; None where nothing is finished."""
        finished = len(list(self.folder.glob("part-*.parquet")))
        return f"run the same command again to go on from part {finished + 1}." if finished else None

    def join(self, count: int) -> None:
        """Move the parts as one file to the output, and remove the folder."""
        joined = self.folder / "joined"
        if self.output.suffix == ".csv":
            self._join_csv(joined, count)
        else:
            parquet = import_pyarrow().parquet
            with parquet.ParquetWriter(joined, self.schema) as writer:
                for table in self._tables(count):
                    writer.write_table(table)
        self.unfinished_run.end()
        os.replace(joined, self.output)
        self.unfinished_run.remove()

    def _tables(self, count: int, columns: list[str] | None = None) -> Iterator[Any]:
        parquet = import_pyarrow().parquet
        for number in range(count):
            yield parquet.read_table(self.path(number), columns=columns)

    def _join_csv(self, path: Path, count: int) -> None:
        # As precise as the finest time stamp of all parts, as pandas would write them as one table.
        timestamp = self.schema.names[1]
        finest = "%Y-%m-%d"
        for table in self._tables(count, [timestamp]):
            # Not nanoseconds: pandas 3 has times after 2262, which they cannot hold.
            stamps = table[timestamp].to_pandas().astype("datetime64[us]").astype("int64")
            if (stamps % 10**6).any():
                finest = "%Y-%m-%d %H:%M:%S.%f"
            elif (stamps % MICROSECONDS_OF_A_DAY).any() and finest == "%Y-%m-%d":
                finest = "%Y-%m-%d %H:%M:%S"
        with path.open("w", encoding="utf-8", newline="") as file:
            for number, table in enumerate(self._tables(count)):
                table.to_pandas().to_csv(
                    file, index=False, header=number == 0, date_format=finest, lineterminator="\n"
                )
