"""Run the tests with the oldest and with the newest declared versions of what the package stands on.

    python tests/run_versions.py
    python tests/run_versions.py --only oldest --folder ~/environments -- -n 1 tests/test_hub.py

Each side gets a virtual environment of its own: the oldest with exactly the lower bounds of `PINNED` that pyproject.toml declares, the
newest with the newest versions that its ranges allow. What follows `--` goes to pytest. A bare Python 3.11 or later is enough; for the
oldest 3.11 or 3.12, which numpy 1.26 and pandas 2.2 are built for.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from xml.etree import ElementTree

import tomllib

ROOT = Path(__file__).parents[1]
PINNED = ("transformers", "chronos-forecasting", "accelerate", "huggingface-hub", "safetensors", "peft")
PINNED += ("numpy", "pandas", "pyarrow")
SHOW = "import sys, importlib.metadata as m; print(*(f'{name}=={m.version(name)}' for name in sys.argv[1:]))"


def lower_bounds() -> list[str]:
    """The requirement `name==bound` of each of `PINNED`, from the dependencies and the extras of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = [requirement for group in groups for requirement in group]
    bounds = dict(match.groups() for text in declared if (match := re.match(r"([\w-]+)>=([\d.]+)", text)))
    return [f"{name}=={bounds[name]}" for name in PINNED]


def install(python: Path, side: str, torch: str) -> None:
    """PyTorch first, for what comes after takes the build that it finds; then the package, its code read where it lies."""
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, torch], check=True)
    constraints = python.parents[1] / "constraints.txt"
    constraints.write_text("\n".join([torch, *(lower_bounds() if side == "oldest" else [])]))
    newest = ["--upgrade", "--upgrade-strategy", "eager"] if side == "newest" else []
    subprocess.run([*pip, *newest, "--constraint", constraints, "--editable", ".[test]"], check=True, cwd=ROOT)


def run(side: str, folder: Path, torch: str, arguments: list[str]) -> tuple[list[str], str, int]:
    """The versions that were installed, what became of the tests, and pytest's exit status."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install(python, side, torch)
    shown = subprocess.run([python, "-c", SHOW, "torch", *PINNED], check=True, capture_output=True, text=True)
    versions = shown.stdout.split()
    print(f"{side}: {', '.join(versions)}", flush=True)

    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", f"--junit-xml={report}", *arguments]
    status = subprocess.run(command, check=False, cwd=ROOT).returncode
    if not report.exists():  # pytest did not get as far
        return versions, "no tests", status
    suite = ElementTree.parse(report).find("testsuite").attrib
    count, bad, skipped = (int(suite[key]) for key in ("tests", "failures", "skipped"))
    errors = int(suite["errors"])
    return versions, f"{count - bad - errors - skipped} passed, {bad + errors} failed, {skipped} skipped", status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("oldest", "newest"), help="One side alone.")
    parser.add_argument("--folder", type=Path, help="Where to keep the environments; a temporary folder if not given.")
    parser.add_argument("--torch", default="torch==2.13.0", help="The requirement of PyTorch, for both sides.")
    parser.add_argument("pytest", nargs="*", help="Further arguments of pytest, after `--`.")
    given = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for side in (given.only,) if given.only else ("oldest", "newest"):
            folder = (given.folder or Path(scratch)).absolute() / side
            rows.append((side, *run(side, folder, given.torch, given.pytest)))
    for side, versions, outcome, status in rows:
        print(f"{side:<7} {outcome}, exit status {status}: {' '.join(versions)}")
    return int(any(status for *_, status in rows))


if __name__ == "__main__":
    sys.exit(main())
