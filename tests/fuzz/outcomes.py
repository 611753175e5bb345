"""What became of damaged input, counted: a table for people and the same as JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["BEFORE", "CLEAR", "EXCEPTION", "HANG", "NAN", "PROPERTY", "UNCHANGED", "WRONG", "report"]

UNCHANGED = "unchanged"
CLEAR = "clear error"
EXCEPTION = "traceback or other exception"
BEFORE = "exception of chronos or transformers, before any class of ours"
HANG = "hang"
WRONG = "silent, wrong output"
UNDETECTABLE = "of them undetectable"
NAN = "silent, NaN or inf"
COLUMNS = (UNCHANGED, CLEAR, EXCEPTION, BEFORE, HANG, WRONG, UNDETECTABLE, NAN)
PROPERTY = (
    "outcomes"  # of a test's report: a list of [way in, outcome, is detectable, what was done, what was said, why not]
)
JSON_VARIABLE = "HF_LOWRANK_FUZZ_JSON"  # the environment variable that names a file to write


def report(properties: Iterable[tuple[str, Any]], write: Any) -> None:
    """Write the table of all outcomes that tests have recorded, and with `HF_LOWRANK_FUZZ_JSON=FILE` all of them as JSON."""
    outcomes = [outcome for name, found in properties if name == PROPERTY for outcome in found]
    if not outcomes:
        return
    rows: dict[str, Counter[str]] = {}
    for way, outcome, is_detectable, *_ in outcomes:
        row = rows.setdefault(way, Counter())
        row[outcome] += 1
        row[UNDETECTABLE] += outcome == WRONG and not is_detectable
    write(f"| way in | {' | '.join(COLUMNS)} |")
    write(f"|---|{'---|' * len(COLUMNS)}")
    for way, row in rows.items():
        write(f"| {way} | {' | '.join(str(row[column]) for column in COLUMNS)} |")
    reasons = Counter(reason for _, outcome, _, _, _, reason in outcomes if outcome == WRONG and reason is not None)
    for reason, count in reasons.most_common():
        write(f"undetectable, {count} times: {reason}")
    if path := os.environ.get(JSON_VARIABLE):
        table = {way: {column: row[column] for column in COLUMNS} for way, row in rows.items()}
        keys = ("way_in", "outcome", "is_detectable", "mutation", "said", "undetectable_because")
        cases = [dict(zip(keys, outcome)) for outcome in outcomes]
        Path(path).write_text(json.dumps({"table": table, "cases": cases}, indent=1))
