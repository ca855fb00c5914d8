"""SmolLM2-135M there and back: bit-identity, and the losses of every form of it on fixed texts.

    make demo && .venv/bin/python benchmarks/smollm2.py --write

The texts are the first 1024 tokens of the Apache-2.0 licence, of the GPL-3 (where the system has it in
/usr/share/common-licenses) and of a piece of this Python's statistics.py. Losses are nats a token in fp32,
computed by transformers on the Hugging Face side and by our decoder on the Megatron side.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
from pathlib import Path

import transformers
from measuring import RESULTS, command_line, provenance, write_result

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.demo.model import dense_model
from ckptbridge.trainer.verify import VerifyReport, verify

LICENCES = Path("/usr/share/common-licenses")


def texts() -> dict[str, str | None]:
    """Name -> text; None is the licence that comes with the program."""
    found: dict[str, str | None] = {"Apache-2.0": None}
    if (LICENCES / "GPL-3").exists():
        found["GPL-3"] = (LICENCES / "GPL-3").read_text()
    source = Path(statistics.__file__).read_text()
    found[f"statistics.py[20000:26000] of Python {platform.python_version()}"] = source[20000:26000]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = run(Path(name))
    if options.write:
        write_result("smollm2.json", result)


def run(work: Path) -> dict[str, object]:
    hf, _ = dense_model(None, work / "hf")
    execute(plan_conversion(open_model(hf), work / "mcore", "torch_dist", ConvertOptions(layout=ParallelLayout(tp=3))))
    receipt = execute(plan_conversion(open_model(work / "mcore"), work / "back", "hf"))
    there = execute(plan_conversion(open_model(hf), work / "again", "hf")).target_tensors
    identical = sum(there[name] == digest for name, digest in receipt.target_tensors.items())
    print(f"round trip at TP 3: {identical} of {len(there)} tensors bit-identical")
    spec = UpcycleSpec(num_experts=4, granularity=2, topk=2)
    execute(plan_conversion(upcycled(open_model(hf), spec), work / "moe", "hf"))
    rows: dict[str, object] = {}
    print(f"{'text':<46}{'HF':>10}{'Megatron':>10}{'|diff|':>10}{'E2G2T2':>10}{'|diff|':>10}")
    for name, text in texts().items():
        sides = verify(hf, work / "mcore", text=text)
        moe = verify(hf, work / "moe", text=text)
        print(
            f"{name:<46}{sides.loss_a:>10.5f}{sides.loss_b:>10.5f}{sides.loss_difference:>10.1e}"
            f"{moe.loss_b:>10.5f}{moe.loss_difference:>10.1e}"
        )
        rows[name] = {"hf_to_megatron": _without_paths(sides), "dense_to_moe": _without_paths(moe)}
    return {
        **provenance(command_line("smollm2.py")),
        "transformers": transformers.__version__,
        "round_trip": {"tensors": len(there), "bit_identical": identical},
        "losses": rows,
    }


def _without_paths(report: VerifyReport) -> dict[str, object]:
    """The report without the names of temporary folders."""
    return {key: value for key, value in report.to_json().items() if key not in ("a", "b")}


if __name__ == "__main__":
    main()
