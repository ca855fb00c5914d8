"""Where a step of our trainer goes on a slice, part by part beside its floor, and the memory planned beside measured.

    python benchmarks/profile_step.py --slice qwen3-30b-a3b --out profile-qwen3 [--recompute selective] [--offload]
    python benchmarks/profile_step.py --all --out profiles

Writes trace.json.gz (ui.perfetto.dev opens it) and table.json into a folder for each slice, and prints the table. The
profiled steps are launched operation by operation; the time of a replayed step stands below. `--slice tiny` needs no
GPU and shows that the script runs, not how fast.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from peers.ours import random_decoder
from peers.program import Options, random_tokens
from slices import SLICES, TINY, Slice

from ckptbridge.kernels.backend import choose_backend
from ckptbridge.trainer.activation_memory import spare_memory
from ckptbridge.trainer.memory_plan import GIB, plan_run
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.profile_floors import costs, measured_rates
from ckptbridge.trainer.profile_run import Profiler, ProfileWindow
from ckptbridge.trainer.recipe import Recipe
from ckptbridge.trainer.recipe_file import parse_recipe
from ckptbridge.trainer.throughput import throughput_of
from ckptbridge.trainer.update import Update

_FIRST, _STEPS, _TIMED = 3, 3, 8


def profile(slice_: Slice, recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Profile a few steps, time a few more, and print what was found."""
    options = Options(device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = measured_rates(device, dtype)
    decoder = random_decoder(slice_, choose_backend("auto", device).name, options)
    optimizer = Optimizer(decoder, recipe.optimizer)
    spare_memory(decoder, recompute=recipe.memory.recompute, offload=recipe.memory.offload == "activations")
    update = Update(
        decoder, optimizer, micro_batch_size=slice_.micro_batch_size, aux_loss_coeff=1e-2, graph=recipe.kernels.graph
    )
    cost = costs(
        slice_.config,
        length=slice_.sequence_length,
        tokens=slice_.tokens,
        element=dtype.itemsize,
        parameters=sum(parameter.numel() for parameter in decoder.parameters()),
        moment=2 if recipe.optimizer.moments == "bf16" else 4,
    )
    window = ProfileWindow(Profiler(decoder, folder, rates, cost), _FIRST, _STEPS)
    shape = (slice_.micro_batch_size, slice_.sequence_length + 1)
    batch_BS = random_tokens(shape, slice_.config.vocab_size, torch.device("cpu"))
    seconds: list[float] = []
    for step in range(1, _FIRST + _STEPS + _TIMED + 1):
        started = time.perf_counter()
        with window.step(step) as is_profiled:
            update.take(batch_BS, 1e-5, is_profiled=is_profiled)
        seconds.append(time.perf_counter() - started)
    print(f"\n{slice_.name}, recompute {recipe.memory.recompute}, offload {recipe.memory.offload}")
    if window.profile is not None:
        print("\n".join(window.profile.lines()))
    throughput = throughput_of(decoder, slice_.sequence_length, slice_.micro_batch_size)
    print(f"Behind that: {throughput.record(statistics.median(seconds[1 - _TIMED :]))}. {update.graph_sentence}")
    if device.type == "cuda":
        plan, measured = plan_run(slice_.config, recipe, device), torch.cuda.max_memory_allocated(device)
        print(f"{plan.sentence(torch.cuda.mem_get_info(device)[1])} Measured: {measured / GIB:.2f} GiB.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--slice", choices=[*SLICES, TINY.name])
    what.add_argument("--all", action="store_true", help="every slice, one after another")
    parser.add_argument("--out", type=Path, required=True, help="folder that the profiles go to")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--moments", choices=("fp32", "bf16"), default="fp32")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    names = list(SLICES) if options.all else [options.slice]
    for name in names:
        slice_ = TINY if name == TINY.name else SLICES[name]
        recipe = parse_recipe(
            {
                "run_folder": str(options.out),
                "model": {"init_from": name},
                "data": {
                    "text": ["none"],
                    "sequence_length": slice_.sequence_length,
                    "micro_batch_size": slice_.micro_batch_size,
                    "global_batch_size": slice_.micro_batch_size,
                },
                "optimizer": {"moments": options.moments},
                "schedule": {"total_steps": 1},
                "memory": {
                    "recompute": options.recompute,
                    "offload": "activations" if options.offload and device.type == "cuda" else "none",
                },
                "precision": "bf16" if device.type == "cuda" else "fp32",
            }
        )
        profile(slice_, recipe, options.out / name, device)
        gc.collect()  # a captured step refers to itself
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
