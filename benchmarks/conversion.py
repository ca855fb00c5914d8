"""Wall time and peak memory of converting a random model, beside `cp -r` of the same bytes in the same run.

    python benchmarks/conversion.py                      # 1.7 GB Llama
    python benchmarks/conversion.py --model mixtral --gb 8 --sync

Each command is a whole process (Python's start included) and is run in turn with the others, `--runs` times;
medians and ranges are printed. The source is read once before, so that its pages are in the cache. Outputs are
removed between runs. With `--sync`, `cp -r` is followed by `sync`, since a conversion syncs its files.
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
from pathlib import Path

import torch

from ckptbridge import __version__
from ckptbridge.converters.fields import write_config
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_named
from ckptbridge.converters.safetensors_header import make_header
from ckptbridge.converters.tensors import Zeros

RESULTS = Path(__file__).parent / "results"


def model_of(name: str, gigabytes: float) -> tuple[Family, ModelConfig]:
    """A model of about so many bytes in bf16: the layers of Llama 1B or of a small Mixtral, as many as it takes."""
    shared = {"num_attention_heads": 32, "num_query_groups": 8, "vocab_size": 32000, "rotary_base": 10000.0}
    if name == "llama":
        one = {"hidden_size": 2048, "ffn_hidden_size": 5632, "kv_channels": 64, **shared}
        layer_nbytes = 2 * (2048 * 64 * (32 * 2 + 8 * 2) + 3 * 2048 * 5632)
    else:
        one = {"hidden_size": 2048, "ffn_hidden_size": 7168, "kv_channels": 64, **shared}
        one |= {"num_moe_experts": 8, "moe_ffn_hidden_size": 7168}
        layer_nbytes = 2 * (2048 * 64 * (32 * 2 + 8 * 2) + 8 * 3 * 2048 * 7168)
    ends_nbytes = 2 * 2 * 32000 * 2048
    layers = max(1, round((gigabytes * 1e9 - ends_nbytes) / layer_nbytes))
    return family_named(name), ModelConfig(num_layers=layers, **one)


def write_random_model(family: Family, config: ModelConfig, folder: Path, shard_nbytes: int = 1_000_000_000) -> int:
    """A Hugging Face folder of random bf16 weights. Returns its tensor bytes."""
    folder.mkdir(parents=True)
    shapes = {n: s for m in family.moves(config) for n, s in zip(m.hf, m.hf_shapes, strict=True)}
    shards: list[dict[str, Zeros]] = [{}]
    for name, shape in shapes.items():
        tensor = Zeros(shape, torch.bfloat16)
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_nbytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header, _ = make_header(shard)
        with (folder / file).open("wb") as out:
            out.write(header)
            for tensor in shard.values():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16)
                out.write(values.view(torch.uint8).numpy().tobytes())
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = write_config(family.fields, config)
    described = {"architectures": [family.architecture], "model_type": family.name, "dtype": "bfloat16", **fields}
    (folder / "config.json").write_text(json.dumps(described))
    return total


_MEASURE = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss / 2**20, status]))
"""
"""A small process of its own starts the command: a child's peak begins at its parent's size."""


def measure(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak resident GiB of the largest process) of one command. Raises if it fails."""
    small = [sys.executable, "-S", "-E", "-c", _MEASURE, *command]
    seconds, peak, status = json.loads(subprocess.run(small, stdout=subprocess.PIPE, check=True).stdout)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("llama", "mixtral"), default="llama")
    parser.add_argument("--gb", type=float, default=1.7)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        result = run(options, Path(work))
    print(json.dumps(result, indent=1) if not sys.stdout.isatty() else "")
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        name = f"conversion-{options.model}-{options.gb:g}gb.json"
        (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


def run(options: argparse.Namespace, work: Path) -> dict[str, object]:
    family, config = model_of(options.model, options.gb)
    nbytes = write_random_model(family, config, work / "hf")
    program = [sys.executable, "-m", "ckptbridge"]
    copy = ["sh", "-c", f"cp -r {work}/hf {work}/copy" + (" && sync" if options.sync else "")]
    steps = {
        "cp -r" + (" && sync" if options.sync else ""): (copy, "copy"),
        "hf2mcore": ([*program, "hf2mcore", str(work / "hf"), str(work / "mcore"), "--quiet"], "mcore"),
        "mcore2hf": ([*program, "mcore2hf", str(work / "source"), str(work / "back"), "--quiet"], "back"),
    }
    subprocess.run([*program, "hf2mcore", str(work / "hf"), str(work / "source"), "--quiet"], check=True)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for attempt in range(options.runs + 1):
        for name, (command, target) in steps.items():
            os.sync()
            measured = measure(command)
            shutil.rmtree(work / target)
            if attempt:  # the first round warms the cache
                taken[name].append(measured)
    print(f"{family.architecture}, {config.num_layers} layers, {nbytes / 1e9:.2f} GB bf16, {options.runs} runs each")
    print(f"{'command':<16}{'median s':>9}{'min':>7}{'max':>7}{'GB/s':>7}{'peak GiB':>10}{'x cp':>7}")
    rows: dict[str, object] = {}
    base = statistics.median(seconds for seconds, _ in next(iter(taken.values())))
    for name, values in taken.items():
        seconds = [s for s, _ in values]
        median, peak = statistics.median(seconds), max(p for _, p in values)
        print(
            f"{name:<16}{median:>9.2f}{min(seconds):>7.2f}{max(seconds):>7.2f}"
            f"{nbytes / 1e9 / median:>7.2f}{peak:>10.2f}{median / base:>7.2f}"
        )
        rows[name] = {"seconds": seconds, "median_s": median, "peak_gib": peak, "times_cp": median / base}
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "ckptbridge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "command": " ".join(["python", "benchmarks/conversion.py", *sys.argv[1:]]),
        "model": family.architecture,
        "nbytes": nbytes,
        "runs": rows,
    }


if __name__ == "__main__":
    main()
