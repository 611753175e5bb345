"""`hf-lowrank push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import json_option
from .output import plain_messages, write_json


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a compressed model.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub, or NAME in your own namespace.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; default: your account's setting.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to. Default: main.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="A file of `evaluate --json`, for the scores in the card.")
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="A file of `bench --json`, for the speed in the card.")
    ] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="The base model's, such as apache-2.0; known for published Chronos."),
    ] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace the card on the Hub even if a person wrote it.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="A file with a token that may write. Default: HF_TOKEN, or that of `hf auth login`."),
    ] = None,
    token: Annotated[str | None, typer.Option(hidden=True)] = None,
    json_file: Annotated[Path | None, json_option("the commit")] = None,
) -> None:
    """Push a compressed model to the Hub with its code and a model card, in one commit."""
    with plain_messages(json_file) as console:
        if token is not None:
            raise ValueError(
                "--token is not taken: what is typed stays in the shell's history. Set HF_TOKEN, run `hf auth login`, or give "
                "--token-file FILE."
            )
        from ..hub.push import push_to_hub

        commit = push_to_hub(
            folder,
            repo_id,
            private=private,
            token=None if token_file is None else _token_of(token_file),
            revision=revision,
            evaluation=evaluation,
            benchmark=benchmark,
            license=license_,
            overwrite_card=overwrite_card,
            commit_message=message,
        )
        write_json(json_file, {"folder": str(folder), "commit": commit.oid, "url": commit.commit_url})
        console.print(f"Pushed: {commit.commit_url}", soft_wrap=True, highlight=False)


def _token_of(file: Path) -> str:
    """The one word that the file holds; ValueError, without a word of the content, where it holds anything else."""
    try:
        words = file.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        words = []
    if len(words) != 1:
        raise ValueError(f"--token-file must hold one token and nothing else, found {len(words)} words in {file}.")
    return words[0]
