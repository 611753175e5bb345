"""Long work that goes on where it was cut off: a folder beside its output, and in it a record of which run it belongs to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import alone, new_folder, remove_folder

__all__ = ["UnfinishedRun"]

ENDING = "ending"


@dataclass(frozen=True)
class UnfinishedRun:
    """The folder that keeps what a run has done until it is complete.

    Its record is a JSON object of all that the outcome depends on. Who adds files to the folder makes them appear whole or not
    at all.

    Attributes:
        folder: Beside the output.
        record_name: The name of the record in the folder.
    """

    folder: Path
    record_name: str

    @classmethod
    def beside(cls, output: str | os.PathLike, suffix: str, record_name: str) -> UnfinishedRun:
        """The run of `output` in the folder `<output>.<suffix>`."""
        output = Path(os.path.abspath(output))
        return cls(output.with_name(f"{output.name}.{suffix}"), record_name)

    def recorded(self, run: Mapping[str, Any], *, resume: bool) -> dict[str, Any] | None:
        """The record of an unfinished run that is the same as `run`; None where there is none.

        Without `resume` the answer is None too, whatever run the folder belongs to: `begin` takes its place.

        Args:
            run: What the outcome depends on, as JSON can hold it. Names that the record has beside these are not compared.
            resume: Whether an unfinished run is to be gone on with.

        Raises:
            FileExistsError: The folder is not one of such a run.
            ValueError: The unfinished run is another one.
        """
        if not self.folder.exists():
            return None
        record = self._read()
        if not record.keys() & run.keys():
            raise self.foreign(f"it has none of {', '.join(run)}")
        if not resume:
            return None
        before, now = _flat({name: record.get(name) for name in run}), _flat(run)
        different = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before | now)
            if before.get(name) != now.get(name)
        ]
        if different:
            raise ValueError(
                f"resume: {self.folder} holds an unfinished run that differs: {'; '.join(different)}. Give the same arguments to "
                "go on with it, or resume=False (--no-resume) to begin anew, which deletes it."
            )
        return record

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other run works towards the same output while the block runs.

        Raises:
            OSError: One does already.
        """
        with alone(self.folder.with_suffix("")):
            yield

    @property
    def is_ending(self) -> bool:
        """Whether all is done but for the output, which may have been moved to its place already."""
        return (self.folder / ENDING).exists()

    def end(self) -> None:
        """Say that what is done next is to move the output to its place."""
        (self.folder / ENDING).touch()

    def begin(self, record: Mapping[str, Any]) -> None:
        """Make the folder with its record, in place of one that `recorded` has looked at."""
        with new_folder(self.folder, overwrite=True, is_replaceable=lambda _: True) as folder:
            (folder / self.record_name).write_text(json.dumps(record, indent=2), encoding="utf-8")

    def remove(self) -> None:
        """Remove the folder, where it is there."""
        remove_folder(self.folder)

    def foreign(self, reason: object) -> FileExistsError:
        """The error of a folder whose record is not that of a run."""
        return FileExistsError(
            f"output: {self.folder} must be the folder of an unfinished run, but its {self.record_name} cannot be read ({reason}). "
            "Move it, or give another output."
        )

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads((self.folder / self.record_name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.foreign(error) from None
        if not isinstance(record, dict):
            raise self.foreign(f"it holds a {type(record).__name__}")
        return record


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"name": "x"}} -> {"model.name": "x"}, values as JSON has them."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
