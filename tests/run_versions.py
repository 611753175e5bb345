"""Run the tests with the oldest and the newest declared versions of what the package stands on, and with those of AutoGluon.

    python tests/run_versions.py
    python tests/run_versions.py --only oldest --folder ~/environments -- -n 1 tests/hub/test_push.py

Each side gets a virtual environment of its own: the oldest with exactly the lower bounds of `PINNED` that pyproject.toml declares, the
newest with the newest versions that its ranges allow, `autogluon` with what pip finds beside AutoGluon-TimeSeries. At last each loads the
checkpoints that the others have saved, with the package and with the code beside the weights. What follows `--` goes to pytest. A bare Python 3.11 or later is enough; for the
oldest 3.11 or 3.12, which numpy 1.26 and pandas 2.2 are built for.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
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
SIDES = {"oldest": [], "newest": [], "autogluon": ["autogluon.timeseries==1.6.3"]}
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
    subprocess.run(
        [*pip, *newest, "--constraint", constraints, "--editable", ".[test]", *SIDES[side]], check=True, cwd=ROOT
    )


def python_of(folder: Path) -> Path:
    return folder / ("Scripts" if os.name == "nt" else "bin") / "python"


def exchange(folders: list[Path]) -> int:
    """Each environment saves checkpoints, and all load them: how many of the loads failed."""
    script, failed = ROOT / "tests" / "integration" / "saved_checkpoints.py", 0
    for saver in folders:
        saved = saver / "checkpoints"
        shutil.rmtree(saved, ignore_errors=True)
        subprocess.run([python_of(saver), script, "save", saved], check=True, cwd=ROOT)
        for loader in folders:
            for remote in ([], ["--remote"]):
                home = {"HF_HOME": str(loader / "home"), "PYTHONPATH": ""}
                command = [python_of(loader), script, "check", saved, *remote]
                status = subprocess.run(command, check=False, cwd=saver, env={**os.environ, **home}).returncode
                how = "the code beside the weights" if remote else "the package"
                print(
                    f"saved by {saver.name}, loaded by {loader.name} with {how}: {'failed' if status else 'the same'}"
                )
                failed += bool(status)
    return failed


def run(side: str, folder: Path, torch: str, arguments: list[str]) -> tuple[list[str], str, int]:
    """The versions that were installed, what became of the tests, and pytest's exit status."""
    venv.create(folder, with_pip=True)
    python = python_of(folder)
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
    parser.add_argument("--only", choices=tuple(SIDES), help="One side alone.")
    parser.add_argument("--folder", type=Path, help="Where to keep the environments; a temporary folder if not given.")
    parser.add_argument("--torch", default="torch==2.13.0", help="The requirement of PyTorch, for all sides.")
    parser.add_argument("pytest", nargs="*", help="Further arguments of pytest, after `--`.")
    given = parser.parse_args()

    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = [
            (given.folder or Path(scratch)).absolute() / side for side in ((given.only,) if given.only else SIDES)
        ]
        for folder in folders:
            rows.append((folder.name, *run(folder.name, folder, given.torch, given.pytest)))
        if len(folders) > 1:
            failed = exchange(folders)
    for side, versions, outcome, status in rows:
        print(f"{side:<9} {outcome}, exit status {status}: {' '.join(versions)}")
    return int(failed > 0 or any(status for *_, status in rows))


if __name__ == "__main__":
    sys.exit(main())
