"""How fast fp8 weights in 128 x 128 blocks are converted, beside the conversion of the bf16 model of that shape.

    python benchmarks/dequantise.py                          # 2 GB Mixtral
    python benchmarks/dequantise.py --gb 8 --folder /data --write

Both commands are `hf2mcore` as a whole process, on the same cores, run in turn, `--runs` times; medians are printed.
Both write the same number of bytes, so the rate is GB of bf16 written a second, and the share is that of the fp8
model against the bf16 model. (Read are about half as many bytes for fp8; that rate stands beside it.) The sources
are in the page cache, and outputs are removed between runs. `cp -r` of the bf16 folder with `sync` runs in the same
turns, and so does a dry run, whose time (Python, torch, the plan) is taken off both for a second, stricter share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import (
    RESULTS,
    Measured,
    command_line,
    machine_in_words,
    measure,
    model_of,
    versions,
    write_random_model,
    write_result,
)
from torch import Tensor

from ckptbridge.converters.fp8_blocks import BlockSize
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.tensors import Zeros

QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """What DeepSeek-V3 has in fp8: every matrix but the embedding, the head and the router."""
    return len(shape) == 2 and not any(part in name for part in ("embed_tokens", "lm_head", ".gate.weight"))


def write_model(family: Family, config: ModelConfig, folder: Path, fp8: bool) -> int:
    """A Hugging Face folder of random weights, in bf16 or in fp8 with scales. Returns its tensor bytes."""
    described = {"quantization_config": QUANTISATION} if fp8 else {}
    return write_random_model(
        family, config, folder, tensors=_described(family, config, fp8), draw=_random, **described
    )


def _described(family: Family, config: ModelConfig, fp8: bool) -> Iterator[tuple[str, Zeros]]:
    for move in family.moves(config):
        for name, shape in zip(move.hf, move.hf_shapes, strict=True):
            if fp8 and is_quantised(name, shape):
                yield name, Zeros(shape, torch.float8_e4m3fn)
                yield f"{name}_scale_inv", Zeros(BlockSize(128, 128).grid(shape), torch.float32)
            else:
                yield name, Zeros(shape, torch.bfloat16)


def _random(tensor: Zeros, generator: torch.Generator) -> Tensor:
    """Normal weights of 0.02, as bf16 or as codes whose largest are near 448, with their scales."""
    if tensor.dtype == torch.float8_e4m3fn:
        codes = torch.empty(tensor.shape, dtype=tensor.dtype)
        one = (torch.randn(1 << 20, generator=generator) * 100).clamp(-448, 448).to(tensor.dtype).view(torch.uint8)
        flat = codes.view(torch.uint8).reshape(-1)
        for start in range(0, len(flat), len(one)):
            flat[start : start + len(one)] = one[: len(flat) - start]
        return codes
    if tensor.dtype == torch.float32:
        return 2e-4 * (1 + torch.rand(tensor.shape, generator=generator))
    return torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16).mul_(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "mixtral"), default="mixtral")
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        result = run(options, Path(work))
    if not sys.stdout.isatty():
        print(json.dumps(result, indent=1))
    if options.write:
        write_result(f"dequantise-{options.model}-{options.gb:g}gb.json", result)


def run(options: argparse.Namespace, work: Path) -> dict[str, object]:
    family, config = model_of(options.model, options.gb)
    read = {kind: write_model(family, config, work / kind, fp8=kind == "fp8") for kind in ("bf16", "fp8")}
    written = read["bf16"]
    program = [sys.executable, "-m", "ckptbridge", "hf2mcore"]
    more = ["--quiet", "--workers", str(options.cores)]
    steps = {kind: [*program, str(work / kind), str(work / "out"), *more] for kind in read}
    steps["cp"] = ["sh", "-c", f"cp -r {work}/bf16 {work}/out && sync"]
    steps["dry run"] = [*steps["fp8"], "--dry-run", "--json"]
    taken: dict[str, list[Measured]] = {name: [] for name in steps}
    for attempt in range(options.runs + 1):
        for name, command in steps.items():
            os.sync()
            measured = measure(command, cores=options.cores)
            shutil.rmtree(work / "out", ignore_errors=True)
            if attempt:  # the first round warms the cache
                taken[name].append(measured)
    median = {name: statistics.median(one.seconds for one in values) for name, values in taken.items()}
    share = median["bf16"] / median["fp8"]
    without_start = (median["bf16"] - median["dry run"]) / (median["fp8"] - median["dry run"])
    print(
        f"{family.architecture}, {config.num_layers} layers, {written / 1e9:.2f} GB of bf16 written, "
        f"{read['fp8'] / 1e9:.2f} GB of fp8 and scales, {options.cores} cores, {options.runs} runs each"
    )
    print(f"{'source':<8}{'median s':>9}{'min':>7}{'max':>7}{'cpu s':>7}{'GB/s out':>10}{'GB/s in':>9}{'peak GiB':>10}")
    rows: dict[str, object] = {}
    for name, values in taken.items():
        walls, cpus = [one.seconds for one in values], [one.processor_seconds for one in values]
        peak = max(one.peak_gib for one in values)
        rates = [0.0 if name == "dry run" else n / 1e9 / median[name] for n in (written, read.get(name, written))]
        print(
            f"{name:<8}{median[name]:>9.2f}{min(walls):>7.2f}{max(walls):>7.2f}{statistics.median(cpus):>7.2f}"
            f"{rates[0]:>10.2f}{rates[1]:>9.2f}{peak:>10.2f}"
        )
        rows[name] = {"seconds": walls, "cpu_seconds": cpus, "median_s": median[name], "peak_gib": peak}
    print(f"fp8 is written at {share:.0%} of the rate of bf16; without the start of both at {without_start:.0%}")
    return {
        **versions(),
        "machine": machine_in_words(),
        "command": command_line("dequantise.py"),
        "model": family.architecture,
        "written_nbytes": written,
        "read_nbytes": read,
        "share_of_the_copys_rate": share,
        "share_without_start": without_start,
        "load_average": os.getloadavg(),
        "runs": rows,
    }


if __name__ == "__main__":
    main()
