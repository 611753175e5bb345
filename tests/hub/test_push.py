"""push_to_hub against a server that keeps what it gets: what arrives, who owns the card, and that nothing is lost when something fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import T5_CODE
from hub_server import Hub, serve, serve_this_process
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel
from typer.testing import CliRunner

from hf_lowrank import compress_pretrained, push_to_hub
from hf_lowrank.cli.app import app
from hf_lowrank.hub.push import is_generated, signed

WEIGHTS = "model.safetensors"
REPO = "ann/small"

pytestmark = pytest.mark.filterwarnings("ignore:Keeping")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A server with two users."""
    with serve_this_process({"hf_ann": "ann", "hf_bob": "bob"}, tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def model(dense_t5, tiny_chronos_config) -> PreTrainedModel:
    dense = dense_t5(num_layers=2, num_decoder_layers=2)
    dense.config.chronos_config = vars(tiny_chronos_config).copy()
    dense.generation_config = GenerationConfig(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    model = compress_pretrained(dense, uniform=4, calibration=None)
    model.config.compression["source"] = "amazon/chronos-t5-tiny"  # as if it had come from the Hub
    return model


def push(model: Any, repo_id: str = REPO, **arguments: Any) -> Any:
    return push_to_hub(model, repo_id, **{"token": "hf_ann"} | arguments)


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """The same model after some training."""
    other = type(model)(model.config)
    other.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})
    return other


# ---- What arrives ----------------------------------------------------------------------------------------------------


def test_one_commit_holds_everything_and_loads(hub: Hub, model: PreTrainedModel, tmp_path: Path) -> None:
    commit = push(model)
    repository = hub.repositories[REPO]
    assert [found.sha for found in repository.history()] == [commit.oid, repository.history()[1].sha]
    wanted = {"README.md", WEIGHTS, "config.json", "generation_config.json", ".gitattributes"} | T5_CODE
    assert set(repository.files) == wanted
    folder = snapshot_download(REPO, cache_dir=tmp_path / "cache", endpoint=hub.url)
    for name, data in repository.files.items():
        assert Path(folder, name).read_bytes() == data
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.config.compression == model.config.compression


def test_the_same_model_again_is_no_new_commit(hub: Hub, model: PreTrainedModel) -> None:
    first = push(model)
    assert push(model).oid == first.oid
    assert hub.count("PUT", "/large/") == 1


def test_a_new_version_replaces_weights_and_card_in_one_commit(hub: Hub, model: PreTrainedModel) -> None:
    push(model)
    stale = "model-00001-of-00002.safetensors"
    for name in (stale, "model.safetensors.index.json", "notes.txt", "model_notes.bin"):
        hub.edit(REPO, name, b"{}")
    before = len(hub.repositories[REPO].history())
    push(changed(model), license="mit", commit_message="Trained longer")
    repository = hub.repositories[REPO]
    assert len(repository.history()) == before + 1
    assert repository.history()[0].message == "Trained longer"
    newest, older = (commit.files for commit in repository.history()[:2])
    assert newest[WEIGHTS] != older[WEIGHTS]
    assert b"license: mit" in newest["README.md"]
    assert set(older) - set(newest) == {
        stale,
        "model.safetensors.index.json",
    }  # a loader could mix them with the new ones


def test_a_revision_is_a_branch_and_main_stays(hub: Hub, model: PreTrainedModel, tmp_path: Path) -> None:
    push(model)
    main = hub.repositories[REPO].branches["main"]
    commit = push(changed(model), revision="next")
    assert hub.repositories[REPO].branches == {"main": main, "next": commit.oid}
    for revision, scale in (("main", 1.0), ("next", 1.5)):
        folder = snapshot_download(REPO, revision=revision, cache_dir=tmp_path / "cache", endpoint=hub.url)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(folder)
        assert torch.equal(loaded.shared.weight, scale * model.shared.weight)
    push(model, revision="next")  # an existing branch is gone on with
    assert hub.repositories[REPO].history("next")[1].sha == commit.oid


def test_a_folder_is_pushed_as_the_model_in_it(hub: Hub, model: PreTrainedModel, tmp_path: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(tmp_path / "small")
    model.float()
    for name in T5_CODE:
        (tmp_path / "small" / name).unlink()  # as one that was saved before models carried their code
    (tmp_path / "token").write_text("hf_ann\n")
    result = CliRunner().invoke(
        app, ["push", str(tmp_path / "small"), "small", "--token-file", str(tmp_path / "token")]
    )
    assert result.exit_code == 0, result.stderr
    files = hub.repositories[REPO].files
    assert f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].branches['main']}" in result.stdout
    assert set(files) >= T5_CODE
    assert files[WEIGHTS] == (tmp_path / "small" / WEIGHTS).read_bytes()
    assert REPO.encode() in files["README.md"]  # with its owner, who was not named


# ---- Whose the card is -----------------------------------------------------------------------------------------------


def test_a_card_of_a_persons_is_kept_until_asked(hub: Hub, model: PreTrainedModel) -> None:
    push(model)
    generated = hub.repositories[REPO].files["README.md"]
    for mine in (b"# Mine\n", generated.replace(b"# small", b"# My small one"), generated + b"\nP.S.\n"):
        hub.edit(REPO, "README.md", mine)
        with pytest.warns(UserWarning, match="written or edited by a person") as caught:
            push(changed(model))
        assert [warning.filename for warning in caught if "person" in str(warning.message)] == [__file__]
        assert hub.repositories[REPO].files["README.md"] == mine
    push(model, overwrite_card=True)
    assert hub.repositories[REPO].files["README.md"] == generated


def test_a_generated_card_is_renewed(hub: Hub, model: PreTrainedModel) -> None:
    push(model)
    hub.edit(REPO, "README.md", hub.repositories[REPO].files["README.md"].replace(b"\n", b"\r\n"))
    push(model, license="mit")
    assert b"license: mit" in hub.repositories[REPO].files["README.md"]


def test_an_edit_during_the_push_is_not_lost(
    hub: Hub, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(model)
    answer = hub.RequestHandlerClass.preupload

    def edited_meanwhile(handler: Any, *args: Any, **kwargs: Any) -> None:
        hub.edit(REPO, "README.md", b"# Just now\n")
        answer(handler, *args, **kwargs)

    monkeypatch.setattr(hub.RequestHandlerClass, "preupload", edited_meanwhile)
    with pytest.raises(OSError, match=r"ann/small failed: somebody committed to it meanwhile; push again"):
        push(changed(model))
    assert hub.repositories[REPO].files["README.md"] == b"# Just now\n"


@pytest.mark.parametrize("text", ["# A\n", "# A", "\n\n# A\r\nb\r\n\r\n", "---\nlicense: mit\n---\n"])
def test_only_the_very_text_is_generated(text: str) -> None:
    card = signed(text)
    assert is_generated(card)
    assert is_generated(card.replace("\n", "\r\n"))
    assert is_generated(card + "\n")
    assert not is_generated(text)
    assert not is_generated(card.replace("# A", "# B").replace("license", "licence"))
    assert not is_generated("More\n" + card)
    assert not is_generated(card + "more")


# ---- What fails ------------------------------------------------------------------------------------------------------


def test_a_private_repository_stays_private(hub: Hub, model: PreTrainedModel, tmp_path: Path) -> None:
    push(model, private=True)
    assert hub.repositories[REPO].private
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download(REPO, token=token, cache_dir=tmp_path / "cache", endpoint=hub.url)
    assert snapshot_download(REPO, token="hf_ann", cache_dir=tmp_path / "cache", endpoint=hub.url)
    before = hub.repositories[REPO].branches["main"]
    with pytest.raises(ValueError, match=r"private=False, but ann/small exists and is private; nothing was pushed"):
        push(changed(model), private=False)
    assert hub.repositories[REPO].branches["main"] == before


def test_a_secret_does_not_go_to_a_public_repository(hub: Hub, model: PreTrainedModel) -> None:
    push(model, private=False)
    before = hub.repositories[REPO].branches["main"]
    with pytest.raises(ValueError, match=r"private=True, but ann/small exists and is public"):
        push(changed(model), private=True)
    assert hub.repositories[REPO].branches["main"] == before
    assert hub.count("PUT", "/large/") == 1


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "token: the Hub does not accept it"),
        (False, "token: the Hub does not accept it, or there is none"),
        (True, "token: the Hub does not accept it, or there is none"),
        ("hf_bob", "token: it may not write to ann/small"),
    ],
)
def test_a_wrong_token_changes_nothing(hub: Hub, model: PreTrainedModel, token: Any, message: str) -> None:
    with pytest.raises(OSError, match=message):
        push(model, token=token)
    assert not hub.repositories
    push(model)
    before = hub.repositories[REPO].branches["main"]
    with pytest.raises(OSError, match=f"pushing to {REPO} failed: {message}"):
        push(changed(model), token=token)
    assert hub.repositories[REPO].branches["main"] == before


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/api/repos/create", 500, "the Hub answered 500"),
        ("GET", "/api/models/ann/small", 502, "the Hub answered 502"),
        ("GET", "/resolve/", 403, "token: it may not write"),
        ("POST", "/preupload/", 403, "token: it may not write"),
        ("PUT", "/large/", 403, "token: it may not write"),
        ("POST", "/commit/", 500, "the Hub answered 500"),
        ("POST", "/commit/", None, "the Hub cannot be reached"),
    ],
)
def test_an_error_in_the_middle_loses_nothing_and_is_resumed(
    hub: Hub, model: PreTrainedModel, method: str, path: str, status: int | None, message: str
) -> None:
    push(model)
    repository = hub.repositories[REPO]
    before = repository.files
    hub.fail(method, path, status)
    with pytest.raises(OSError, match=rf"^repo_id: pushing to ann/small failed: {message}"):
        push(changed(model))
    assert repository.files is before
    uploaded = len(hub.large)
    assert uploaded == (2 if path == "/commit/" else 1)
    requests = hub.count("PUT", "/large/")
    push(changed(model))
    assert repository.files[WEIGHTS] != before[WEIGHTS]
    assert hub.count("PUT", "/large/") - requests == 2 - uploaded  # what had arrived is not sent again


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.33"),
    reason="this huggingface_hub gives up at a broken connection",
)
def test_a_broken_connection_is_tried_again(hub: Hub, model: PreTrainedModel) -> None:
    hub.fail("PUT", "/large/", None)
    push(model)
    assert hub.count("PUT", "/large/") == 2
    assert WEIGHTS in hub.repositories[REPO].files


def test_no_hub_at_all(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({}) as gone:
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="pushing to ann/small failed: the Hub cannot be reached"):
        push(model)


def test_what_cannot_be_pushed_is_said_before_anything_is(
    hub: Hub, model: PreTrainedModel, dense_t5, tmp_path
) -> None:
    with pytest.raises(ValueError, match=r"model must be a low-rank one .*found T5ForConditionalGeneration"):
        push(dense_t5())
    with pytest.raises(OSError, match="nowhere is no folder"):
        push(tmp_path / "nowhere")
    dense_t5().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="is a T5ForConditionalGeneration; it must be a low-rank model"):
        push(tmp_path / "dense")
    with pytest.raises(ValueError, match="repo_id must be 'owner/name'"):
        push(model, "a/b/c")
    (tmp_path / "notes.json").write_text("[]")
    with pytest.raises(ValueError, match=r"evaluation: .*notes.json must be a file of `hf-lowrank evaluate --json`"):
        push(model, evaluation=tmp_path / "notes.json")
    with pytest.raises(ValueError, match=r"benchmark: .*notes.json must be a file of `hf-lowrank bench --json`"):
        push(model, benchmark=tmp_path / "notes.json")
    assert not hub.requests
    code = CliRunner().invoke(app, ["push", str(tmp_path / "nowhere"), REPO])
    assert code.exit_code == 1
    assert code.stderr.startswith("error: model: ")


NAME = "encoder.final_layer_norm.weight"


@pytest.mark.parametrize(
    ("change", "in_folder", "loaded"),
    [
        (lambda weights: weights.pop(NAME), f"lacks the weights {NAME}", f"{NAME} is missing, too many"),
        (lambda weights: weights.update(more=torch.ones(2)), "knows nothing of: more", "more is missing, too many"),
        (lambda weights: weights[NAME][:1].fill_(torch.nan), f"{NAME} of .* holds NaN", f"{NAME} of .* holds NaN"),
        (
            lambda weights: weights[NAME][:1].fill_(torch.inf),
            f"{NAME} of .* holds NaN or inf",
            f"{NAME} of .* holds NaN or inf",
        ),
    ],
)
def test_a_model_that_is_not_whole_is_not_pushed(
    hub: Hub, model: PreTrainedModel, tmp_path: Path, change: Any, in_folder: str, loaded: str
) -> None:
    model.save_pretrained(tmp_path / "torn")
    weights = load_file(tmp_path / "torn" / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / "torn" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=in_folder):
        push(tmp_path / "torn")
    # The same in memory, as a person's surgery may leave it.
    broken = changed(model)
    parameters = {"final_layer_norm": broken.encoder.final_layer_norm}
    if NAME not in weights:
        parameters["final_layer_norm"].weight = None
    elif "more" in weights:
        broken.register_parameter("more", torch.nn.Parameter(torch.ones(2)))
    else:
        change({NAME: parameters["final_layer_norm"].weight.data})
    with pytest.raises(ValueError, match=loaded):
        push(broken)
    assert not hub.requests


def test_a_token_is_never_said(
    hub: Hub, model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither typed where the shell keeps it, nor in a message or a traceback."""
    model.save_pretrained(tmp_path / "small")
    secret, file = "hf_very_secret", tmp_path / "token"

    def said(*options: str, environment: str | None = None) -> str:
        monkeypatch.setenv("HF_TOKEN", environment) if environment else monkeypatch.delenv("HF_TOKEN", raising=False)
        result = CliRunner().invoke(app, ["push", str(tmp_path / "small"), REPO, *options])
        assert result.exit_code == 1
        assert secret not in result.output
        error: BaseException | None = result.exception
        while error is not None:
            assert secret not in repr(error)
            error = error.__cause__ or error.__context__
        return result.stderr

    assert "--token is not taken: what is typed stays in the shell's history. Set HF_TOKEN" in said("--token", secret)
    assert "HF_TOKEN" in said(f"--token={secret}")
    for content, found in (("", 0), (f"{secret} {secret}", 2)):
        file.write_text(content)
        assert f"--token-file must hold one token and nothing else, found {found} words" in said(
            "--token-file", str(file)
        )
    file.write_bytes(b"\xff" + secret.encode())
    assert "found 0 words" in said("--token-file", str(file))
    assert "No such file" in said("--token-file", str(tmp_path / "nowhere"))
    for odd in (f"{secret}\u20ac", f"{secret}\x01"):
        file.write_text(odd)
        assert "token must be one word of printable characters" in said("--token-file", str(file))
        with pytest.raises(ValueError, match="token must be one word of printable characters"):
            push(model, token=odd)
    assert "printable" in said(environment=f"{secret}\u20ac")
    assert not hub.requests
    file.write_text(secret)
    assert "the Hub does not accept it" in said("--token-file", str(file))
    assert "the Hub does not accept it" in said(environment=secret)
    monkeypatch.setenv("HF_TOKEN", "hf_ann")
    assert CliRunner().invoke(app, ["push", str(tmp_path / "small"), REPO]).exit_code == 0
