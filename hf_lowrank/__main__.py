"""`python -m hf_lowrank` is `hf-lowrank`; `accelerate launch -m hf_lowrank` starts it in several processes."""

from .cli.app import app

if __name__ == "__main__":
    app()
