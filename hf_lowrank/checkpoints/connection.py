"""Where a checkpoint is: in the package, in a folder, or on the Hub; without a way there what is in the cache is taken at once."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, is_offline_mode

from .published import HUB_IDS

__all__ = ["REFERENCES", "checkpoint_path", "from_hub_or_cache", "is_hub_id", "nearly"]

ASSETS = Path(__file__).parents[1] / "assets"
# Small trained checkpoints that the package ships.
REFERENCES = {name: ASSETS / name.replace("-", "_") for name in ("reference", "reference-bolt", "reference-2")}
SECONDS = 3.0
Load = TypeVar("Load", bound=Callable[..., Any])


def checkpoint_path(name: str | os.PathLike) -> str:
    """The folder or Hub id that `name` stands for: `"reference"`, `"reference-bolt"` and `"reference-2"` are in the package."""
    return str(REFERENCES.get(str(name), name))


def is_hub_id(name: str) -> bool:
    """Whether a name can be that of a checkpoint on the Hub, and is none of a folder or of the package."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not os.path.exists(checkpoint_path(name))


def nearly(name: str) -> str | None:
    """The known checkpoint that a name is nearly, or is but for its owner; None of a folder, and of a name that is right."""
    if os.path.exists(name) or name in (*REFERENCES, *HUB_IDS):
        return None
    has_owner = "/" in name
    by_name = {one if has_owner else one.split("/")[-1]: one for one in (*HUB_IDS, *([] if has_owner else REFERENCES))}
    alike = difflib.get_close_matches(name, by_name, n=1, cutoff=0.8)
    return by_name[alike[0]] if alike else None


def from_hub_or_cache(load: Load) -> Load:
    """Let a function that reads a checkpoint, its first argument, look for a Hub id in the cache alone if the Hub gives no answer.

    The libraries would ask six times for each file, half a minute in all. A folder is read as ever, and so is what is on S3.
    """

    @wraps(load)
    def loading(source: Any, *args: Any, **kwargs: Any) -> Any:
        with _hub_or_cache(source):
            return load(source, *args, **kwargs)

    return cast("Load", loading)


@contextmanager
def _hub_or_cache(source: Any) -> Iterator[None]:
    is_id = isinstance(source, str) and is_hub_id(source)
    is_misspelled = is_id and "/" not in source and nearly(source) is not None  # what is read says so, at once
    if not is_id or is_offline_mode() or (not is_misspelled and _answers(constants.ENDPOINT)):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers(endpoint: str) -> bool:
    try:
        _ask(endpoint)
    except OSError:
        return False
    return True


@lru_cache  # what has answered once is asked no more; an error is no answer, and not kept
def _ask(endpoint: str) -> None:
    """Raise OSError where there is no answer of any kind."""
    with suppress(HTTPError):  # which is one
        urlopen(Request(endpoint, method="HEAD"), timeout=SECONDS).close()
