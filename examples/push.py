"""Put a compressed checkpoint on the Hub, with a model card, and load it from there as others will.

    hf auth login
    python examples/push.py chronos-lowrank me/chronos-lowrank --evaluation evaluation.json --private

Prints the address of the commit. A card that you have written or edited stays as it is. `HF_ENDPOINT` names another Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from chronos import BaseChronosPipeline

from hf_lowrank import push_to_hub


def main(
    folder: Annotated[Path, typer.Argument(help="What compress, recover or fine-tuning has written.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name")],
    evaluation: Annotated[Path | None, typer.Option(help="Scores for the card, of examples/evaluate.py.")] = None,
    private: Annotated[bool, typer.Option(help="Let nobody else see it.")] = False,
) -> None:
    commit = push_to_hub(folder, repo_id, evaluation=evaluation, private=private)
    print(commit.commit_url)
    # Where hf_lowrank is not installed: BaseChronosPipeline.from_pretrained(repo_id, trust_remote_code=True)
    pipeline = BaseChronosPipeline.from_pretrained(repo_id, revision=commit.oid)
    print(f"{type(pipeline).__name__} of {pipeline.inner_model.num_parameters():,} parameters")


if __name__ == "__main__":
    typer.run(main)
