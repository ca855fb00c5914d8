"""Megatron-LM's own reading of a command line and a checkpoint's arguments: run as `flags_worker.py JOB.json`.

For each case the steps of `megatron.training.arguments.parse_and_validate_args` up to the model's configuration, in
one process that stands for the first of `world_size`. What comes out is compared with what this project tells the
real megatron-core; the differences go to the case's file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import typing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

RANK_WITHOUT_GPU = ("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-rope-fusion")
"""Kernels that are not installed here."""


def main(job_file: Path) -> None:
    if not hasattr(typing, "override"):  # Python 3.11; megatron.training asks for it and nothing else that is newer
        typing.override = override  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # pyright: ignore
    torch.cuda.get_device_properties = lambda device=None: argparse.Namespace(major=9)  # pyright: ignore
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for case in json.loads(job_file.read_text()):
        results.write(json.dumps(outcome(case), default=str) + "\n")
        results.flush()


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    """What Megatron-LM refused as "error"; else "differences" by field, and the "args" that a checkpoint would get."""
    try:
        args, transformer, gpt = megatron_reads(case)
        expected = import_module("ckptbridge.trainer.megatron.model").transformer_of(
            case["config"]["transformer"], **case["degrees"], dtype=getattr(torch, case["dtype"])
        )
    except SystemExit as error:
        return {"error": f"the parser refused: {error}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    plain = (bool, int, float, str, list, tuple)
    return {
        "differences": differences(case["config"]["gpt"], transformer, expected, gpt),
        "args": {name: value for name, value in vars(args).items() if isinstance(value, plain)},
    }


def differences(told: dict[str, Any], transformer: Any, expected: Any, gpt: Any) -> dict[str, str]:
    """How the fields of TransformerConfig, and of GPTModelConfig what GPTModel is told, differ from the expected."""
    # Not the dataclass's fields alone: what YaRN is told are attributes that Megatron-LM adds.
    found = {name: _plain(value) for name, value in vars(transformer).items()}
    wanted = {name: _plain(value) for name, value in vars(expected).items()}
    for name, value in told.items():
        wanted[f"gpt.{name}"] = value
        found[f"gpt.{name}"] = getattr(gpt, {"max_sequence_length": "seq_length"}.get(name, name))
    return {
        name: f"expected {wanted.get(name)!r}, Megatron-LM made {found.get(name)!r}"
        for name in sorted(wanted.keys() | found.keys())
        if not _alike(wanted.get(name), found.get(name))
    }


def megatron_reads(case: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The arguments, the TransformerConfig and the GPTModelConfig of a command line."""
    arguments = import_module("megatron.training.arguments")
    checkpointing = import_module("megatron.training.checkpointing")
    argument_utils = import_module("megatron.training.argument_utils")
    os.environ["WORLD_SIZE"] = str(case["world_size"])
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # asked for below Blackwell
    sys.argv = ["pretrain_gpt.py", *case["argv"], "--micro-batch-size", "1", *RANK_WITHOUT_GPU]
    args = arguments.parse_args()
    if args.use_checkpoint_args:
        checkpointing.load_args_from_checkpoint(args)
    arguments.validate_args(args)
    return args, argument_utils.core_transformer_config_from_args(args), argument_utils.gpt_config_from_args(args)


def _alike(wanted: Any, found: Any) -> bool:
    """A float that was computed from a flag's may differ in its last digits."""
    if isinstance(wanted, float) and isinstance(found, float):
        return math.isclose(wanted, found, rel_tol=1e-12)
    return wanted == found


def _plain(value: Any) -> Any:
    """Initialisations are closures: what they are made of is compared instead."""
    if isinstance(value, partial):
        return [value.func.__qualname__, *map(str, value.args), *map(str, value.keywords.values())]
    if callable(value):
        return value.__qualname__
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(Path(sys.argv[1]))
