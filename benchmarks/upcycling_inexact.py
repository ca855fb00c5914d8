"""SmolLM2 upcycled by the methods that cannot be exact: how far each layer and the loss are off before any training.

    make demo && .venv/bin/python benchmarks/upcycling_inexact.py --write          # about ten minutes on two cores

Each mixture is a view; source and mixture run side by side, layer by layer, in fp32 (trainer/upcycling/probe.py).
Calibration sees other text than the probe: half of Python's statistics.py against the other half and a licence.
`--distill N` adds the random split distilled on N tokens a layer, of the calibration text.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, command_line, machine_in_words, versions, write_result

from ckptbridge.converters.model import Model, open_model
from ckptbridge.demo.model import dense_model
from ckptbridge.trainer.recipe_file import parse_section
from ckptbridge.trainer.tokens import load_tokenizer
from ckptbridge.trainer.upcycle_recipe import UpcycleSection
from ckptbridge.trainer.upcycling.prepared import prepared
from ckptbridge.trainer.upcycling.probe import probe

SPLIT = {"num_experts": 8, "topk": 4, "method": "split"}
CMOE = {"num_experts": 8, "topk": 4, "method": "cmoe"}
CASES: dict[str, dict[str, Any]] = {
    "split, random, factor N/T (LLaMA-MoE)": {**SPLIT, "split": "random"},
    "split, random, factor measured": {**SPLIT, "split": "random", "calibrate": True},
    "split, clustering": {**SPLIT, "split": "clustering", "calibrate": True},
    "split, clustering, a quarter shared": {
        **SPLIT,
        "split": "clustering",
        "shared": "partition",
        "shared_width": 384,
        "calibrate": True,
    },
    "cmoe (a quarter shared)": {**CMOE, "calibrate": True},
    "cmoe, router of representative neurons": {**CMOE, "router_init": "neurons", "calibrate": True},
    "cmoe, router drawn at random": {**CMOE, "router_init": "random", "calibrate": True},
    "cmoe, 8 of 8": {**CMOE, "topk": 8, "calibrate": True},
    "drop, half of the neurons": {"num_experts": 8, "topk": 2, "method": "drop"},
    "drop, masks of the released code": {"num_experts": 8, "topk": 2, "method": "drop", "drop_mask": "per-matrix"},
    "virtual groups E8G8T8, cube root": {"num_experts": 64, "topk": 8, "granularity": 8, "scaling": "paper"},
}
PROBE_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*CASES], choices=[*CASES], metavar="CASE")
    parser.add_argument("--distill", type=int, metavar="TOKENS", help="also train the random split so long")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        hf, described = dense_model(None, work / "hf")
        dense = open_model(hf)
        calibration, sequences = texts(dense, work)
        cases = {label: CASES[label] for label in options.only}
        if options.distill:
            told = f"split, random, distilled on {options.distill} tokens"
            cases[told] = {**CASES["split, random, factor measured"], "distill": {"tokens": options.distill}}
        print(f"{described}, {sum(map(len, sequences))} tokens")
        rows = {label: measured(dense, label, case, calibration, sequences, work) for label, case in cases.items()}
    if options.write:
        said = {"machine": machine_in_words(), "command": command_line("upcycling_inexact.py")}
        write_result("upcycling-inexact.json", {**versions(), **said, "cases": rows})


def texts(dense: Model, work: Path) -> tuple[Path, list[torch.Tensor]]:
    """The file to calibrate on, and the sequences to compare on: code and a licence."""
    code = Path(statistics.__file__).read_text()
    calibration = work / "calibration.txt"
    calibration.write_text(code[: len(code) // 4])
    licence = (Path(__file__).parents[1] / "trainer/verify_text.txt").read_text()
    tokenizer = load_tokenizer(dense.path)
    halves = (code[len(code) // 2 :], licence)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][: PROBE_TOKENS // 2] for text in halves]
    return calibration, [torch.tensor(numbers) for numbers in ids]


def measured(
    dense: Model, label: str, case: dict[str, Any], calibration: Path, sequences: list[torch.Tensor], work: Path
) -> dict[str, Any]:
    """One method's layers and loss, printed as a line."""
    values = {**case, "report": False}
    if values.pop("calibrate", False):
        values["calibrate"] = str(calibration)
    with tempfile.TemporaryDirectory(dir=work) as name:
        made = prepared(dense, parse_section(UpcycleSection, values, label), Path(name))
        found = probe(made.sources, made.mixture, sequences)
    layers = [layer.output_difference for layer in found.layers]
    (logits,) = found.logits
    row = {
        "spec": case,
        "layer_difference": {"mean": statistics.fmean(layers), "largest": max(layers)},
        "dense_loss": logits.loss_source,
        "loss": logits.loss_mixture,
    }
    print(
        f"{label:<44}{statistics.fmean(layers):>8.3f}{logits.loss_source:>9.4f} -> {logits.loss_mixture:.4f}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
