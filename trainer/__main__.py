"""`python -m ckptbridge.trainer RECIPE`: the trainer without the rest of the command line (as torchrun starts it)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Run a recipe; each step's record goes to standard output as a line of JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ckptbridge.trainer", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="the YAML file of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="change a value of the recipe, such as optimizer.lr=3e-5; may be given several times",
    )
    arguments = parser.parse_args()
    # Threads that wait for each other sleep instead of spinning. Measured on 2 shared cores: with another program at
    # work a step of SmolLM2 takes 3.5 s instead of 24 s; with none, the difference is below the noise. OpenMP reads
    # it once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from ckptbridge.converters.errors import CkptBridgeError
    from ckptbridge.trainer.loop import train
    from ckptbridge.trainer.recipe_file import load_recipe

    try:
        train(load_recipe(arguments.recipe, arguments.overrides), on_step=_print)
    except CkptBridgeError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: the same command resumes from the newest checkpoint\n")
        return 130
    return 0


def _print(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
