"""Convert onto a disk that fills up on the way: run as `python -m tests.converters.full_disk`, prints one JSON object.

`when` says what happens: "at once" (the disk is too small), "on the way" (a file of somebody else takes the rest
while the first file is written), "file size" (the system limits the size of a file).
"""

from __future__ import annotations

import json
import resource
import sys
import traceback
from pathlib import Path

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import CkptBridgeError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model


def main(source: Path, disk: Path, when: str, max_file_size: int) -> dict[str, object]:
    """The error that came out, and what lies on the disk."""
    target, filler = disk / "target", disk / "somebody_elses"

    def fill(done: int, total: int) -> None:
        if when == "on the way" and not filler.exists():
            with filler.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass

    if when == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    options = ConvertOptions(workers=1, max_file_size=max_file_size)
    plan = plan_conversion(open_model(source), target, "torch_dist", options)
    told: dict[str, object] = {"error": None}
    try:
        execute(plan, fill)
    except CkptBridgeError as error:
        told = {"error": type(error).__name__, "exit_code": error.exit_code, "text": str(error)}
    except Exception as error:
        told = {"error": type(error).__name__, "exit_code": None, "text": traceback.format_exc()}
    filler.unlink(missing_ok=True)
    told["target"], told["partial"] = target.exists(), (disk / "target.partial").exists()
    if when == "on the way" and told["error"]:
        execute(
            plan_conversion(
                open_model(source),
                target,
                "torch_dist",
                ConvertOptions(workers=1, max_file_size=max_file_size, resume=True),
            )
        )
        told["resumed"] = target.exists()
    return told


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))
