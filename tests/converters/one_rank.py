"""One process of several that share a conversion: run as `python -m tests.converters.one_rank`, prints one JSON object.

It takes one JSON object: source, target, to, rank, world_size, patience, options (of ConvertOptions, layout as a
dictionary), `die_at`, the share of its bytes after which the process kills itself with SIGKILL, and `late`, seconds for
which it rests before it looks at what all ranks have written.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ckptbridge.converters import execute as execution
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import CkptBridgeError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.ranks import Rank


def main(told: dict[str, Any]) -> dict[str, Any]:
    """How the conversion ended on this rank, and how many bytes were its share."""
    share = 0

    def progress(done: int, total: int) -> None:
        nonlocal share
        share = total
        if told.get("die_at") is not None and done >= told["die_at"] * total:
            os.kill(os.getpid(), signal.SIGKILL)

    rank = Rank(rank=told["rank"], world_size=told["world_size"], patience=told["patience"])
    chosen: dict[str, Any] = {"workers": 1, **told["options"]}
    chosen["layout"] = ParallelLayout(**chosen.get("layout", {}))
    look = execution._told

    def look_late(*arguments: Any) -> Any:
        time.sleep(told.get("late", 0.0))
        return look(*arguments)

    execution._told = look_late
    try:
        options = ConvertOptions(rank=rank, **chosen)
        receipt = execute(
            plan_conversion(open_model(Path(told["source"])), Path(told["target"]), told["to"], options), progress
        )
    except CkptBridgeError as error:
        return {"error": type(error).__name__, "text": str(error), "share": share}
    return {"error": None, "tensors": len(receipt.target_tensors), "share": share}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
