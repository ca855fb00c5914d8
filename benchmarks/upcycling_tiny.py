"""Every exact way to upcycle, on tiny models of five families: the largest difference of fp32 logits from the dense.

    python benchmarks/upcycling_tiny.py --write          # about five minutes on two cores

The dense model's logits are those of its own transformers class. The mixture is computed by the transformers class
that it was written for, by our decoder on the torch_dist checkpoint, and by the real megatron-core on one rank. The
cases are those of the tests (tests/converters/upcycle_cases.py); a text in place of a number says why there is none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import RESULTS, command_line, machine_in_words, versions, write_result

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.trainer.megatron.config import transformer_config
from ckptbridge.trainer.megatron.launch import Run, compute
from tests.converters.upcycle_cases import EXACT, SOURCES, TOLERANCE, spec_of, written
from tests.megatron.launch import MEGATRON, check_fetched
from tests.tiny import reference_logits, save_tiny, token_ids
from tests.trainer.decoder_run import decoder_logits

ENGINES = ("transformers", "our decoder", "megatron-core")
Cell = float | str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SOURCES, default=[*SOURCES])
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    check_fetched()
    sys.path.insert(0, str(MEGATRON))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        cells = {source: measured(source, Path(name) / source) for source in options.only}
    worst = {engine: max(numbers_of(cells, engine), default=0.0) for engine in ENGINES}
    counts = {engine: len(numbers_of(cells, engine)) for engine in ENGINES}
    print("worst: " + ", ".join(f"{engine} {worst[engine]:.1e} of {counts[engine]} cases" for engine in ENGINES))
    if options.write:
        told = {**versions(), "transformers": transformers.__version__, "megatron-core": MEGATRON.name.split("-")[-1]}
        said = {"machine": machine_in_words(), "command": command_line("upcycling_tiny.py")}
        write_result("upcycling-tiny.json", {**told, **said, "worst": worst, "cases": counts, "differences": cells})
    if max(worst.values()) > TOLERANCE:
        raise SystemExit(f"more than {TOLERANCE}")


def measured(source: str, work: Path) -> dict[str, dict[str, Cell]]:
    """Every case of one source, a line each."""
    dense = save_tiny(source, work / "dense")
    expected = reference_logits(dense, token_ids())
    cells: dict[str, dict[str, Cell]] = {}
    runs: dict[str, Model] = {}
    for kind in EXACT:
        row = cells[kind] = dict[str, Cell]()
        try:
            folder = written(upcycled(open_model(dense), spec_of(EXACT[kind], to="hf")), work / kind / "hf")
            row["transformers"] = (reference_logits(folder, token_ids()) - expected).abs().max().item()
        except NotSupportedError:
            row["transformers"] = "no class"
        try:
            moe = upcycled(open_model(dense), spec_of(EXACT[kind], to="mcore"))
        except NotSupportedError:
            row |= {"our decoder": "no class", "megatron-core": "no class"}
            continue
        there = written(moe, work / kind / "mcore", "torch_dist")
        row["our decoder"] = (decoder_logits(there) - expected).abs().max().item()
        runs[kind] = open_model(there)
    run_megatron(runs, expected, cells, work)
    for kind, row in cells.items():
        shown = "".join(f"{cell:>14.1e}" if isinstance(cell, float) else f"{cell:>14}" for cell in row.values())
        print(f"{source:<10}{kind:<32}{shown}", flush=True)
    return cells


def run_megatron(
    models: dict[str, Model], expected: torch.Tensor, cells: dict[str, dict[str, Cell]], work: Path
) -> None:
    """Fill in what the real megatron-core computes of those that it can be told."""
    runs: dict[str, Run] = {}
    for kind, model in models.items():
        try:
            transformer_config(model.config)
        except NotSupportedError:
            cells[kind]["megatron-core"] = "not told"
        else:
            runs[kind] = Run(model=model, layout=ParallelLayout())
    ids = token_ids(batch=1)
    alone = expected if len(expected) == 1 else reference_logits(work / "dense", ids)
    for kind, found in zip(runs, compute([*runs.values()], ids[0], torch.float32, work), strict=True):
        if found.missing_keys or found.unexpected_keys:
            raise SystemExit(f"{kind}: keys {found.missing_keys} {found.unexpected_keys}")
        cells[kind]["megatron-core"] = (found.logits_TV - alone[0]).abs().max().item()


def numbers_of(cells: dict[str, dict[str, dict[str, Cell]]], engine: str) -> list[float]:
    found: list[Any] = [row[engine] for rows in cells.values() for row in rows.values()]
    return [cell for cell in found if isinstance(cell, float)]


if __name__ == "__main__":
    main()
