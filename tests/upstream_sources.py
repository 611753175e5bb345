"""The test suites of transformers and chronos-forecasting, from the source distributions of the installed versions.

They are downloaded with pip into a folder outside the repository and used from there; nothing of them is ours.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# What transformers' common tests import and its source distribution lacks. The mixins are empty, so their tests do not run;
# the arguments are those of `PreTrainedConfig`, each other than its default.
LACKING = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False, "output_hidden_states": True, "dtype": "float16",
    "chunk_size_feed_forward": 3, "architectures": ["Some"], "id2label": {0: "only"}, "label2id": {"only": 0},
    "problem_type": "regression",
}
""",
}


def cache() -> Path:
    """The folder of everything downloaded: `HF_LOWRANK_UPSTREAM`, or one of the system's temporary folders."""
    return Path(os.environ.get("HF_LOWRANK_UPSTREAM") or Path(tempfile.gettempdir()) / "hf-lowrank-upstream")


def source(package: str) -> Path:
    """The unpacked source distribution of the installed version of a package."""
    folder = cache() / f"{package}-{version(package)}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            pip("download", "--no-deps", "--no-binary", package, "--dest", scratch, f"{package}=={version(package)}")
            (archive,) = Path(scratch).glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(Path(scratch) / "unpacked", filter="data")
            (unpacked,) = (Path(scratch) / "unpacked").iterdir()
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(unpacked, folder)
    return folder


def transformers_tests() -> Path:
    """A folder for `sys.path` whose package `transformers_tests` is transformers' tests folder, with what they import."""
    folder = source("transformers") / "importable"
    package = folder / "transformers_tests"
    if not package.is_dir():
        shutil.copytree(folder.parent / "tests", package)
        for name, text in LACKING.items():
            if not (package / name).exists():
                (package / name).parent.mkdir(exist_ok=True)
                (package / name).write_text(text)
        pip("install", "--no-deps", "--target", folder, "parameterized")
    return folder


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(
            f"pip could not get the upstream tests: {' '.join(command)}\n{result.stdout}{result.stderr}"
        )
