"""Continued pretraining of a dense model, of exact mixtures made from it, and of inexact ones: held-out loss by tokens.

    python benchmarks/upcycling_training.py run --model smollm2-135m --text '/usr/lib/python3/**/*.py' --out result.json
    python benchmarks/upcycling_training.py draw result.json docs/pictures/upcycling-training.png

Every variant sees the same tokens in the same order, with the same optimizer and schedule, and is measured on the same
held-out documents. Variants are upcycled while they are loaded (`model.upcycle` of the recipe); nothing is written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ckptbridge import __version__
from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import LOG_NAME, train
from ckptbridge.trainer.recipe import Recipe

_FINE = {"num_experts": 64, "topk": 8, "granularity": 8}
_PUBLISHED = {"scaling": "paper", "to": "qwen2_moe"}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "E8G8T8 exact": _FINE,
    "E8G8T8 cube root": _FINE | {"scaling": "paper"},
    "E8G8T8 cube root, pre-softmax": _FINE | _PUBLISHED | {"router": "pre-softmax", "router_std": 0.02},
    "E8G8T8 exact, sigmoid, groups": _FINE | {"router": "sigmoid", "router_groups": True},
    "E8G1T2 exact": {"num_experts": 8, "topk": 2},
    "E8G1T2 drop 0.5": {"num_experts": 8, "topk": 2, "method": "drop"},
    "E8G8T8 exact, router 0.02": _FINE | {"router_std": 0.02},
    "E8G8T8 exact, router 0.1": _FINE | {"router_std": 0.1},
}
"""The published recipe is He et al.'s (arXiv 2410.07524): softmax over all experts, the cube root on each matrix."""


def recipe_of(options: argparse.Namespace, spec: dict[str, Any] | None, folder: Path, seed: int) -> Recipe:
    """The recipe of one variant."""
    batch = options.sequence_length * options.batch
    steps = -(-options.tokens // batch)
    return Recipe.model_validate(
        {
            "run_folder": str(folder),
            "model": {"init_from": str(options.model)} | ({"upcycle": {**spec, "seed": seed}} if spec else {}),
            "data": {
                "text": options.text,
                "sequence_length": options.sequence_length,
                "micro_batch_size": options.micro_batch,
                "global_batch_size": options.batch,
                "max_bytes": options.max_bytes,
                "seed": seed,
            },
            "optimizer": {"lr": options.lr},
            "schedule": {"total_steps": steps, "warmup_steps": options.warmup, "min_lr": options.lr / 10},
            "moe": {"aux_loss_coeff": options.aux_loss_coeff},
            "evaluation": {"every": options.evaluate_every, "batches": options.evaluation_batches},
            "export": {"hf": False},
            "precision": options.precision,
            "seed": seed,
        }
    )


def run(options: argparse.Namespace) -> None:
    """Train every variant, one after the other, and write their curves."""
    curves: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        tokens: Path | None = None
        for seed in options.seeds:
            tokens = None  # another seed takes and holds out other documents
            for variant in options.variants or VARIANTS:
                folder = Path(name) / f"{seed}-{variant.replace(' ', '_')}"
                folder.mkdir()
                if tokens is not None:
                    shutil.copytree(tokens, folder / "tokens")
                curves.append(measured(options, variant, folder, seed))
                tokens = Path(name) / f"tokens-{seed}"
                if not tokens.exists():
                    shutil.copytree(folder / "tokens", tokens)
                shutil.rmtree(folder)
                write(options, curves)


def measured(options: argparse.Namespace, variant: str, folder: Path, seed: int) -> dict[str, Any]:
    """One variant's curve."""
    started = time.perf_counter()
    train(recipe_of(options, VARIANTS[variant], folder, seed))
    records = read_log(folder / LOG_NAME)
    held_out = [(record.get("tokens", 0), record["held_out_loss"]) for record in records if "held_out_loss" in record]
    steps = [record for record in records if "loss" in record]
    fast = sorted(record["tokens_per_s"] for record in steps)[len(steps) // 2]
    losses = [loss for _, loss in held_out]
    millions, seconds = held_out[-1][0] / 1e6, time.perf_counter() - started
    print(
        f"{variant:<32} seed {seed}: {losses[0]:8.4f} before, {losses[-1]:.4f} after {millions:.1f}M tokens, "
        f"worst on the way {max(losses):.4f}; {fast / 1e3:.0f}k tokens/s, {seconds:.0f} s",
        flush=True,
    )
    return {
        "variant": variant,
        "seed": seed,
        "upcycle": VARIANTS[variant],
        "held_out": held_out,
        "loss": [[record["tokens"], record["loss"]] for record in steps],
        "busiest_expert": [
            [record["tokens"], max(record["expert_load"]["max"])] for record in steps if "expert_load" in record
        ],
        "median_tokens_per_s": fast,
        "peak_memory_gib": max(record["peak_memory_bytes"] for record in steps) / 2**30,
    }


def write(options: argparse.Namespace, curves: list[dict[str, Any]]) -> None:
    """Write what is measured so far."""
    if options.out is None:
        return
    told = {name: value for name, value in vars(options).items() if name not in ("out", "work", "do", "model", "text")}
    result = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "ckptbridge": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "options": told,
        "curves": curves,
    }
    options.out.write_text(json.dumps(result) + "\n")


def draw(options: argparse.Namespace) -> None:
    """Draw a result: every curve on a logarithmic scale, and those near the dense model's on a plain one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    result = json.loads(options.result.read_text())
    curves = [curve for curve in result["curves"] if curve["variant"] in (options.variants or VARIANTS)]
    first_seed, dense = curves[0]["seed"], next(curve for curve in curves if curve["variant"] == "dense")
    names = [*dict.fromkeys(curve["variant"] for curve in curves)]
    colours = dict(zip(names, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), dpi=130, layout="constrained")
    for curve in curves:
        tokens, losses = zip(*curve["held_out"], strict=True)
        is_first = curve["seed"] == first_seed
        for axes in (left, right):
            axes.plot(
                [count / 1e6 for count in tokens],
                losses,
                color="black" if curve["variant"] == "dense" else colours[curve["variant"]],
                linewidth=2.2 if curve["variant"] == "dense" else 1.5,
                linestyle="-" if is_first else "--",
                label=f"{curve['variant']}: {losses[0]:.3f} -> {losses[-1]:.3f}" if is_first else None,
            )
    start = dense["held_out"][0][1]
    left.set(yscale="log", title="all of them")
    left.set_yticks([1, 1.5, 2, 3, 5, 8, 12], ["1", "1.5", "2", "3", "5", "8", "12"])
    right.set(
        ylim=(min(loss for curve in curves for _, loss in curve["held_out"]) - 0.02, start * 1.15),
        title="near the dense model",
    )
    for axes in (left, right):
        axes.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8, frameon=False)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--model", required=True, help="a dense Hugging Face folder with its tokenizer")
    runs.add_argument("--text", nargs="+", required=True, help="files, folders or globs")
    runs.add_argument("--tokens", type=int, default=4_000_000)
    runs.add_argument("--max-bytes", type=int, default=None)
    runs.add_argument("--sequence-length", type=int, default=1024)
    runs.add_argument("--batch", type=int, default=32, help="sequences a step")
    runs.add_argument("--micro-batch", type=int, default=16)
    runs.add_argument("--lr", type=float, default=1e-4)
    runs.add_argument("--warmup", type=int, default=10)
    runs.add_argument("--aux-loss-coeff", type=float, default=1e-2)
    runs.add_argument("--evaluate-every", type=int, default=2)
    runs.add_argument("--evaluation-batches", type=int, default=4)
    runs.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0])
    runs.add_argument("--variants", nargs="+", choices=VARIANTS)
    runs.add_argument("--work", type=Path, default=None, help="where run folders lie meanwhile")
    runs.add_argument("--out", type=Path, default=None)
    draws = commands.add_parser("draw")
    draws.add_argument("result", type=Path)
    draws.add_argument("picture", type=Path)
    draws.add_argument("--variants", nargs="+")
    options = parser.parse_args()
    run(options) if options.do == "run" else draw(options)


if __name__ == "__main__":
    sys.exit(main())
