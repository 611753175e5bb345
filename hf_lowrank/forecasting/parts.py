"""The finished parts of a forecast in a folder beside its output, so that a run that was cut off can go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..files import new_folder
from .long_file import Contents, import_pyarrow

__all__ = ["Parts"]

MANIFEST = "manifest.json"
MICROSECONDS_OF_A_DAY = 86_400 * 10**6


@dataclass(frozen=True)
class Parts:
    """`OUTPUT.parts`: a manifest that says which run it belongs to, and a parquet file for each finished table.

    Every file appears whole or not at all. `schema` is that of the forecasts in arrow's words.
    """

    output: Path
    schema: Any

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".parts")

    def unfinished(self, run: Mapping[str, Any], *, resume: bool) -> Contents | None:
        """What an unfinished run with the same input, model and options found in the input; None where there is no run, or, without
        `resume`, one that need not be the same.

        Raises:
            ValueError: The folder belongs to another run, or is none of a run.
        """
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return None
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            contents = Contents(**manifest.pop("contents"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"output: {self.folder} must be the folder of an unfinished run, but its {MANIFEST} cannot be read ({error}). "
                "Remove it, or choose another output."
            ) from None
        if not resume:
            return None
        before, now = _flat(manifest), _flat(run)
        different = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before | now)
            if before.get(name) != now.get(name)
        ]
        if different:
            raise ValueError(
                f"output: {self.folder} holds an unfinished run that differs: {'; '.join(different)}. Run it with the same input, model and "
                "options, or begin anew with resume=False (--no-resume), which deletes it."
            )
        return contents

    def begin(self, run: Mapping[str, Any], contents: Contents) -> None:
        """Make the folder, in place of one that `unfinished` has looked at."""
        with new_folder(self.folder, overwrite=True) as folder:
            manifest = json.dumps({**run, "contents": asdict(contents)}, indent=2) + "\n"
            (folder / MANIFEST).write_text(manifest, encoding="utf-8")

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"

    def num_rows(self, number: int) -> int | None:
        """The rows of a finished part; None where it is missing or damaged, as a loss of power may leave it."""
        try:
            return import_pyarrow().parquet.read_metadata(self.path(number)).num_rows
        except (OSError, ValueError):
            return None

    def write(self, number: int, forecasts: pd.DataFrame) -> None:
        pa = import_pyarrow()
        table = pa.Table.from_pandas(forecasts, schema=self.schema, preserve_index=False, safe=False)
        unfinished = self.folder / "unfinished"
        pa.parquet.write_table(table, unfinished)
        os.replace(unfinished, self.path(number))

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
        os.replace(joined, self.output)
        shutil.rmtree(self.folder)

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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"name": "x"}} -> {"model.name": "x"}, values as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
