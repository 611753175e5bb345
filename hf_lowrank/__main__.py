"""`hf-lowrank`, and `python -m hf_lowrank`, which is the same; `accelerate launch -m hf_lowrank` starts it in several processes."""

import sys

from .interrupts import Raise, handled, interruption_of

__all__ = ["main"]


def main() -> None:
    """Run the command line. An interruption is one line whenever it comes, in the imports too."""
    with handled(Raise()):
        try:
            from .cli.app import app

            app()
        except SystemExit:
            raise
        except BaseException as error:
            interruption = interruption_of(error)
            if interruption is None:
                raise
            sys.stderr.write(f"interrupted: {interruption.how}\n")
            sys.exit(128 + interruption.number)


if __name__ == "__main__":
    main()
