"""Where a checkpoint is, and what is said without waiting where it cannot be reached."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, is_offline_mode

from hf_lowrank import load_pipeline
from hf_lowrank.checkpoints.connection import REFERENCES, nearly
from hf_lowrank.checkpoints.loading import load_config


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The connections to a Hub that breaks them all."""
    made: list[object] = []

    class Hub(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            made.append(self.client_address)

    with socketserver.TCPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield made
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("referense", "reference"),
        ("Reference", "reference"),
        ("reference_bolt", "reference-bolt"),
        ("reference2", "reference-2"),
        ("references", "reference"),
        ("chronos-t5-smal", "amazon/chronos-t5-small"),
        ("chronos-bolt-base", "amazon/chronos-bolt-base"),
    ],
)
def test_a_misspelled_name_is_not_looked_for_on_the_network(name, meant, calls):
    for load in (load_pipeline, load_config):
        with pytest.raises(OSError, match=rf"^model: there is no '{name}'; did you mean '{meant}'\?$"):
            load(name)
    assert not calls


@pytest.mark.parametrize("name", [*REFERENCES, "amazon/chronos-2", "me/reference", "t5-small", "tests"])
def test_right_names_are_near_to_none(name):
    assert nearly(name) is None


@pytest.mark.parametrize("load", [load_pipeline, load_config])
def test_a_hub_that_gives_no_answer_is_asked_once(load, calls, cache):
    with pytest.raises(
        OSError,
        match=r"^model: me/model is no folder .* \(it is not in the cache, and http://127\S+ cannot be reached\)\.$",
    ):
        load("me/model")
    assert len(calls) == 1
    assert not is_offline_mode()
    with pytest.raises(OSError, match=r"cannot be reached\); did you mean 'amazon/chronos-t5-small'\?$"):
        load("amazon/chronos-t5-smal")
    assert len(calls) == 2  # the network may be there again


def test_what_is_in_the_cache_is_loaded_without_the_hub(chronos_t5, calls, cache):
    repository = cache / "models--me--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    chronos_t5.save_pretrained(repository / "snapshots" / ("0" * 40))
    assert load_pipeline("me/model").inner_model.config.name_or_path == "me/model"
    assert len(calls) == 1


def test_what_is_in_the_package_or_in_a_folder_needs_no_hub(chronos_t5, calls, tmp_path):
    chronos_t5.save_pretrained(tmp_path)
    for name in ("reference", tmp_path, str(tmp_path)):
        load_config(name)
    load_pipeline(tmp_path)
    for name in (str(tmp_path / "gone"), "a/b/c"):
        with pytest.raises(OSError, match=f"^model: {name} is no folder and no Hub id that can be read"):
            load_pipeline(name)
    assert not calls
