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
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptbridge import __version__
from ckptbridge.converters.fields import write_config
from ckptbridge.converters.fp8_blocks import BlockSize
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_named
from ckptbridge.converters.safetensors_header import make_header
from ckptbridge.converters.tensors import Zeros

RESULTS = Path(__file__).parent / "results"
SHARD_NBYTES = 1_000_000_000
QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def model_of(name: str, gigabytes: float) -> tuple[Family, ModelConfig]:
    """A model of about so many bytes in bf16, with the widths of a small Mixtral or of Llama 1B."""
    width = 7168 if name == "mixtral" else 5632
    one: dict[str, Any] = {
        "hidden_size": 2048,
        "ffn_hidden_size": width,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "kv_channels": 64,
        "vocab_size": 32000,
        "rotary_base": 10000.0,
    }
    matrices = 3 * (8 if name == "mixtral" else 1)
    layer_nbytes = 2 * (2048 * 64 * (32 * 2 + 8 * 2) + matrices * 2048 * width)
    if name == "mixtral":
        one |= {"num_moe_experts": 8, "moe_ffn_hidden_size": width}
    layers = max(1, round((gigabytes * 1e9 - 2 * 2 * 32000 * 2048) / layer_nbytes))
    return family_named(name), ModelConfig(num_layers=layers, **one)


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """What DeepSeek-V3 has in fp8: every matrix but the embedding, the head and the router."""
    return len(shape) == 2 and not any(part in name for part in ("embed_tokens", "lm_head", ".gate.weight"))


def write_model(family: Family, config: ModelConfig, folder: Path, fp8: bool) -> int:
    """A Hugging Face folder of random weights, in bf16 or in fp8 with scales. Returns its tensor bytes."""
    folder.mkdir(parents=True)
    shards: list[dict[str, Zeros]] = [{}]
    for name, tensor in _described(family, config, fp8):
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_NBYTES:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(make_header(shard)[0])
            for tensor in shard.values():
                out.write(_random(tensor, generator).view(torch.uint8).numpy().tobytes())
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    fields = write_config(family.fields, config) | ({"quantization_config": QUANTISATION} if fp8 else {})
    described = {"architectures": [family.architecture], "model_type": family.name, "dtype": "bfloat16", **fields}
    (folder / "config.json").write_text(json.dumps(described))
    return total


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


_MEASURE = """
import json, os, subprocess, sys, time
os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[1])]))
start = time.perf_counter()
process = subprocess.Popen(sys.argv[2:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - start
print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, status]))
"""
"""A small process of its own starts the command: a child's peak begins at its parent's size."""


def measure(command: list[str], cores: int) -> tuple[float, float, float]:
    """(wall seconds, processor seconds, peak resident GiB) of one command on so many cores. Raises if it fails."""
    small = [sys.executable, "-S", "-E", "-c", _MEASURE, str(cores), *command]
    *taken, status = json.loads(subprocess.run(small, stdout=subprocess.PIPE, check=True).stdout)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return taken[0], taken[1], taken[2]


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
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"dequantise-{options.model}-{options.gb:g}gb.json").write_text(json.dumps(result, indent=1) + "\n")


def run(options: argparse.Namespace, work: Path) -> dict[str, object]:
    family, config = model_of(options.model, options.gb)
    read = {kind: write_model(family, config, work / kind, fp8=kind == "fp8") for kind in ("bf16", "fp8")}
    written = read["bf16"]
    program = [sys.executable, "-m", "ckptbridge", "hf2mcore"]
    more = ["--quiet", "--workers", str(options.cores)]
    steps = {kind: [*program, str(work / kind), str(work / "out"), *more] for kind in read}
    steps["cp"] = ["sh", "-c", f"cp -r {work}/bf16 {work}/out && sync"]
    steps["dry run"] = [*steps["fp8"], "--dry-run", "--json"]
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    for attempt in range(options.runs + 1):
        for name, command in steps.items():
            os.sync()
            measured = measure(command, options.cores)
            shutil.rmtree(work / "out", ignore_errors=True)
            if attempt:  # the first round warms the cache
                taken[name].append(measured)
    median = {name: statistics.median(seconds for seconds, _, _ in values) for name, values in taken.items()}
    share = median["bf16"] / median["fp8"]
    without_start = (median["bf16"] - median["dry run"]) / (median["fp8"] - median["dry run"])
    print(
        f"{family.architecture}, {config.num_layers} layers, {written / 1e9:.2f} GB of bf16 written, "
        f"{read['fp8'] / 1e9:.2f} GB of fp8 and scales, {options.cores} cores, {options.runs} runs each"
    )
    print(f"{'source':<8}{'median s':>9}{'min':>7}{'max':>7}{'cpu s':>7}{'GB/s out':>10}{'GB/s in':>9}{'peak GiB':>10}")
    rows: dict[str, object] = {}
    for name, values in taken.items():
        walls, cpus = [wall for wall, _, _ in values], [cpu for _, cpu, _ in values]
        peak = max(gib for _, _, gib in values)
        rates = [0.0 if name == "dry run" else n / 1e9 / median[name] for n in (written, read.get(name, written))]
        print(
            f"{name:<8}{median[name]:>9.2f}{min(walls):>7.2f}{max(walls):>7.2f}{statistics.median(cpus):>7.2f}"
            f"{rates[0]:>10.2f}{rates[1]:>9.2f}{peak:>10.2f}"
        )
        rows[name] = {"seconds": walls, "cpu_seconds": cpus, "median_s": median[name], "peak_gib": peak}
    print(f"fp8 is written at {share:.0%} of the rate of bf16; without the start of both at {without_start:.0%}")
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "ckptbridge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "command": " ".join(["python", "benchmarks/dequantise.py", *sys.argv[1:]]),
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
