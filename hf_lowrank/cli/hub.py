"""`hf-lowrank push` and `hf-lowrank publish`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import CHECKPOINT, check_data, json_option
from .output import in_terminal, plain_messages, write_json

Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Of a new repository; default: your account's setting.")
]
License = Annotated[
    str | None, typer.Option("--license", help="The base model's, such as apache-2.0; known for published Chronos.")
]
OverwriteCard = Annotated[
    bool, typer.Option("--overwrite-card", help="Replace the card on the Hub even if a person wrote it.")
]
TokenFile = Annotated[
    Path | None,
    typer.Option(help="A file with a token that may write. Default: HF_TOKEN, or that of `hf auth login`."),
]


def push(
    folder: Annotated[Path, typer.Argument(help="The folder of a compressed model.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub, or NAME in your own namespace.")],
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to. Default: main.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="A file of `evaluate --json`, for the scores in the card.")
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="A file of `bench --json`, for the speed in the card.")
    ] = None,
    license_: License = None,
    overwrite_card: OverwriteCard = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    token_file: TokenFile = None,
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


def publish(
    source: Annotated[str, typer.Argument(help=f"{CHECKPOINT}.")],
    repo_id: Annotated[
        str | None, typer.Option("--push", help="OWNER/NAME on the Hub. Without it all is made but the commit.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep all that is made here. Default: NAME-lowrank, by the name of SOURCE.")
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Lose at most this share. Default, if no other rule is given: 0.01.")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Keep at most this share of the attention parameters.")] = None,
    total_ratio: Annotated[
        float | None, typer.Option(help="The same of attention and feed-forward parameters together.")
    ] = None,
    target_speedup: Annotated[float | None, typer.Option(help="Forecast this many times as fast.")] = None,
    quantize: Annotated[str | None, typer.Option(help="'int8' or 'int4': keep matrices as integers.")] = None,
    calibration: Annotated[
        str, typer.Option(help="'synthetic', a CSV or parquet file of series, or a .safetensors file.")
    ] = "synthetic",
    settings: Annotated[
        Path | None,
        typer.Option(help="In place of these rules: a JSON file of CompressionSettings.save."),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--evaluate", help="Tasks or groups, separated by commas; see evaluate --list.")
    ] = "m1_yearly,packaged",
    repeats: Annotated[int, typer.Option(help="Forecasts of each side that are timed.")] = 5,
    private: Private = None,
    license_: License = None,
    overwrite_card: OverwriteCard = False,
    token_file: TokenFile = None,
    dtype: Annotated[
        str, typer.Option(help="Of the model: 'float32', 'bfloat16', 'float16', or 'auto' as in SOURCE.")
    ] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as 'cuda'.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all of it.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with what the folder holds, or delete it.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and about how long it takes, and stop.")
    ] = False,
    json_file: Annotated[Path | None, json_option("what was made, or with --dry-run the plan,")] = None,
) -> None:
    """Compress a Chronos checkpoint, score and time it against the dense one, and push it with a card that says all this.

    The same command goes on where an earlier one was cut off. For example: hf-lowrank publish reference-bolt --dry-run
    """
    with plain_messages(json_file) as console:
        from ..compression.settings import CompressionSettings
        from ..hub.publish import plan_publication
        from ..hub.publish import publish as run

        check_data("--calibration", calibration, (".csv", ".parquet", ".safetensors"))
        rules: dict[str, Any] = {
            "max_loss": max_loss,
            "ratio": ratio,
            "total_ratio": total_ratio,
            "target_speedup": target_speedup,
            "quantize": quantize,
        }
        rules = {name: value for name, value in rules.items() if value is not None}
        if settings is not None and rules:
            raise ValueError(f"Give either --settings or {', '.join(rules)}, not both.")
        chosen = (
            CompressionSettings(**rules, calibration=None if calibration == "none" else calibration, seed=seed)
            if settings is None
            else CompressionSettings.from_file(settings)
        )
        arguments: dict[str, Any] = {
            "folder": folder or Path(f"{Path(source).name}-lowrank"),
            "tasks": tasks.split(","),
            "dtype": dtype,
            "device": device,
            "repeats": repeats,
            "seed": seed,
            "resume": resume,
        }
        if dry_run:
            plan = plan_publication(source, repo_id, chosen, **arguments)
            write_json(json_file, plan.to_dict())
            console.print(in_terminal(plan.table()))
            console.print(in_terminal(plan.sizes.table()))
            return
        made = run(
            source,
            repo_id,
            chosen,
            private=private,
            token=None if token_file is None else _token_of(token_file),
            license=license_,
            overwrite_card=overwrite_card,
            show_progress=True,
            **arguments,
        )
        write_json(json_file, made.to_dict())
        if made.commit is not None:
            console.print(f"Published: {made.commit.commit_url}", soft_wrap=True, highlight=False)
            return
        console.print(
            f"The model is in {made.model}. Push it: hf-lowrank push {made.model} OWNER/NAME --evaluation {made.evaluation} "
            f"--benchmark {made.benchmark}",
            soft_wrap=True,
            highlight=False,
        )
