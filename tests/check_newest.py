"""Fail where an installed run-time dependency is not the newest that the bare package allows, and say what holds it down.

    python tests/check_newest.py

The package must be installed in the environment that runs this. pip is asked what it would change to have all of the package's
`dependencies` at their newest, whatever else is installed; it changes nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement  # installed with transformers
from packaging.utils import canonicalize_name

PACKAGE = "hf-lowrank"
TORCH = "torch"  # stays as it is: CI installs the CPU build of one release, the newest brings gigabytes of CUDA
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
ASK = [*PIP, "--dry-run", "--report", "-", "--upgrade", "--upgrade-strategy", "eager"]


def run_time_dependencies() -> dict[str, str]:
    """Requirements by normalised name, of the package without any extra."""
    declared = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    without_extra = [found for found in declared if found.marker is None or found.marker.evaluate({"extra": ""})]
    return {canonicalize_name(found.name): str(found) for found in without_extra}


def newer_versions(requirements: dict[str, str]) -> dict[str, str]:
    """The versions, by normalised name, of what pip would install in place of what there is."""
    wanted = requirements | {TORCH: f"{TORCH}=={metadata.version(TORCH)}"}
    answer = subprocess.run([*ASK, *wanted.values()], check=True, stdout=subprocess.PIPE, text=True).stdout
    chosen = [entry["metadata"] for entry in json.loads(answer)["install"]]
    return {canonicalize_name(entry["name"]): entry["version"] for entry in chosen}


def holders(name: str, version: str) -> list[str]:
    """What is installed and forbids `version` of `name`, with what it asks for."""
    found = set()
    for package in metadata.distributions():
        for requirement in map(Requirement, package.requires or []):
            is_active = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if is_active and canonicalize_name(requirement.name) == name and version not in requirement.specifier:
                found.add(f"{package.name} {package.version} requires {requirement.name}{requirement.specifier}")
    return sorted(found)


def main() -> int:
    dependencies = run_time_dependencies()
    newer = newer_versions(dependencies)
    for name in dependencies:
        print(f"{name} {metadata.version(name)}" + (f": not the newest, {newer[name]}" if name in newer else ""))
        if name in newer:
            reasons = holders(name, newer[name]) or ["nothing that is installed forbids it: upgrade"]
            print(*(f"    {reason}" for reason in reasons), sep="\n")
    return int(not newer.keys().isdisjoint(dependencies))


if __name__ == "__main__":
    sys.exit(main())
