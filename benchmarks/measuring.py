"""What the benchmarks share: checkpoints of random weights, commands as whole processes, and files of results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptbridge import __version__
from ckptbridge.converters.fields import write_config
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_named
from ckptbridge.converters.safetensors_header import make_header
from ckptbridge.converters.tensors import Zeros

RESULTS = Path(__file__).parent / "results"
SHARD_NBYTES = 1_000_000_000


def plain_weights(family: Family, config: ModelConfig) -> dict[str, Zeros]:
    """Every tensor of a model's Hugging Face folder, in bf16."""
    shapes = {n: s for m in family.moves(config) for n, s in zip(m.hf, m.hf_shapes, strict=True)}
    return {name: Zeros(shape, torch.bfloat16) for name, shape in shapes.items()}


def normal(tensor: Zeros, generator: torch.Generator) -> Tensor:
    """Normal weights of 1, in bf16."""
    return torch.randn(tensor.shape, generator=generator, dtype=torch.bfloat16)


def write_random_model(
    family: Family,
    config: ModelConfig,
    folder: Path,
    shard_nbytes: int = SHARD_NBYTES,
    *,
    tensors: Iterable[tuple[str, Zeros]] = (),
    draw: Callable[[Zeros, torch.Generator], Tensor] = normal,
    **described: Any,
) -> int:
    """A Hugging Face folder of random weights, by default `plain_weights`. Returns its tensor bytes.

    `described` goes into config.json beside what describes the model.
    """
    folder.mkdir(parents=True)
    shards: list[dict[str, Zeros]] = [{}]
    for name, tensor in tensors or plain_weights(family, config).items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_nbytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(make_header(shard)[0])
            for tensor in shard.values():
                out.write(draw(tensor, generator).view(torch.uint8).numpy().tobytes())
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    said = {"architectures": [family.architecture], "model_type": family.name, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**said, **write_config(family.fields, config), **described}))
    return total


def model_of(name: str, gigabytes: float) -> tuple[Family, ModelConfig]:
    """A model of about so many bytes in bf16: the layers of Llama 1B or of a small Mixtral, as many as it takes."""
    is_mixture = name == "mixtral"
    width, matrices = (7168, 8 * 3) if is_mixture else (5632, 3)
    layer_nbytes = 2 * (2048 * 64 * (32 * 2 + 8 * 2) + matrices * 2048 * width)
    ends_nbytes = 2 * 2 * 32000 * 2048
    config = ModelConfig(
        num_layers=max(1, round((gigabytes * 1e9 - ends_nbytes) / layer_nbytes)),
        hidden_size=2048,
        ffn_hidden_size=width,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=32000,
        rotary_base=10000.0,
        num_moe_experts=8 if is_mixture else None,
        moe_ffn_hidden_size=width if is_mixture else None,
    )
    return family_named(name), config


_MEASURE = """
import json, os, subprocess, sys, time
if int(sys.argv[2]):
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: int(sys.argv[2])]))
start = time.perf_counter()
process = subprocess.Popen(sys.argv[3:], stdout=open(sys.argv[1], "wb"))
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - start
print(json.dumps([seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, status]))
"""
"""A small process of its own starts the command: a child's peak begins at its parent's size."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one process: wall seconds, the processor's seconds in it and in the kernel for it, peak resident GiB."""

    seconds: float
    processor_seconds: float
    peak_gib: float


def measure(command: list[str], *, output: Path = Path(os.devnull), cores: int = 0, is_quiet: bool = False) -> Measured:
    """Run one command, its output in a file, on so many cores (0: all). Raises if it fails.

    `is_quiet` drops what it says on stderr too.
    """
    small = [sys.executable, "-S", "-E", "-c", _MEASURE, str(output), str(cores), *command]
    stderr = subprocess.DEVNULL if is_quiet else None
    *numbers, status = json.loads(subprocess.run(small, stdout=subprocess.PIPE, stderr=stderr, check=True).stdout)
    if status:
        raise SystemExit(f"{' '.join(command)} failed with status {status}")
    return Measured(*numbers)


def versions() -> dict[str, str]:
    """The day, and what ran."""
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "ckptbridge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def machine_in_words() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def command_line(program: str) -> str:
    """How this run was started."""
    return " ".join(["python", f"benchmarks/{program}", *sys.argv[1:]])


def provenance(command: str) -> dict[str, Any]:
    """What a result file opens with: the day, the command, what ran and where."""
    told = versions()
    return {
        "date": told["date"],
        "command": command,
        "versions": {name: told[name] for name in ("ckptbridge", "torch", "python")},
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "processor": platform.machine()},
    }


def write_result(name: str, result: dict[str, Any]) -> None:
    """`name` in the folder of results."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


def put_between_marks(file: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- MARK -->` and `<!-- end of MARK -->` in a markdown file."""
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, found, rest = file.read_text().partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{file}: expected the marks {start} and {end}")
    file.write_text(f"{before}{start}\n{text.strip()}\n{end}{after}")
