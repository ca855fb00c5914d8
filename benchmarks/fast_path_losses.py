"""Does the fast path train as the reference does? The same 200 steps on real text by both, their losses side by side.

    python benchmarks/fast_path_losses.py run --model FOLDER --text '/usr/lib/python3/**/*.py' --out result.json
    python benchmarks/fast_path_losses.py draw result.json docs/pictures/fast-path-losses.png

Every run starts from the same weights and sees the same tokens in the same order. In bf16 two correct programs differ:
each rounds in its own places, and steps carry the difference on. How much that is shows a third run, the reference in
fp32: the fast path may be as far from it as the reference in bf16 is, times `ALLOWED`, and a run with a planted fault
has to be further. (A learning rate that makes training chaotic hides any fault: roundings then grow as large.)
The result file is written after each run, and a run that it has is not taken again.
The model is made of FOLDER while it is loaded (8 copies of each MLP, 2 a token); without --model it is a small mixture
of random weights. `draw` prints the numbers and exits with 1 if the fast path is too far off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import command_line, versions
from small_model import save_small_model
from training import records_of

from ckptbridge.kernels.backend import choose_backend
from ckptbridge.trainer.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Way:
    """A way through the same computation."""

    backend: str
    graph: bool
    precision: str = "bf16"
    capacity_factor: float | None = None


FAULTY = "fast path that drops tokens"
"""A planted fault: experts give up what exceeds their even share. The comparison has to find it."""
WAYS = {
    "fast path": Way("auto", graph=True),
    "fast path, no graph": Way("auto", graph=False),
    "reference": Way("reference", graph=False),
    "reference in fp32": Way("reference", graph=False, precision="fp32"),
    FAULTY: Way("auto", graph=True, capacity_factor=1.0),
}
ALLOWED = 1.5
"""Both roundings are of one size; means of 200 correlated differences scatter by some tens of percent."""


def recipe_of(options: argparse.Namespace, model: Path, way: Way, folder: Path) -> Recipe:
    """The recipe of one run."""
    spec = {"upcycle": {"num_experts": 8, "topk": 2}} if options.model else {}
    return Recipe.model_validate(
        {
            "run_folder": str(folder),
            "model": {"init_from": str(model)} | spec,
            "data": {
                "text": options.text,
                "sequence_length": options.sequence_length,
                "micro_batch_size": options.micro_batch,
                "global_batch_size": options.batch,
                "max_bytes": options.max_bytes,
            },
            "optimizer": {"lr": options.lr},
            "schedule": {"total_steps": options.steps, "warmup_steps": min(10, options.steps - 1)},
            "moe": {"aux_loss_coeff": 1e-2, "capacity_factor": way.capacity_factor},
            "kernels": {"backend": way.backend, "graph": "auto" if way.graph else "off"},
            "evaluation": {"every": max(1, options.steps // 10), "batches": 4},
            "export": {"hf": False},
            "precision": way.precision,
        }
    )


def run(options: argparse.Namespace) -> None:
    """Train each way, one after the other; write what is known after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    done: dict[str, Any] = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        model = options.model or save_small_model(Path(name) / "model")
        for label in options.ways or WAYS:
            if label in done:
                continue
            started = time.perf_counter()
            folder = Path(name) / label.replace(" ", "-")
            records = records_of(recipe_of(options, model, WAYS[label], folder))
            done[label] = {
                **asdict(WAYS[label]),
                "tokens": json.loads((folder / "tokens" / "index.json").read_text())["digest"],
                "kernels": str(choose_backend(WAYS[label].backend, device)),
                "loss": [record["loss"] for record in records if "loss" in record],
                "held_out": [[r["step"], r["held_out_loss"]] for r in records if "held_out_loss" in r],
                "tokens_per_s": statistics.median(r["tokens_per_s"] for r in records if "loss" in r),
                "seconds": round(time.perf_counter() - started, 1),
            }
            print(f"{label}: {done[label]['seconds']:.0f} s, {done[label]['tokens_per_s']:.0f} tokens/s", flush=True)
            write(options, done)
    sys.exit(report(done))


def write(options: argparse.Namespace, runs: dict[str, Any]) -> None:
    """The result file: what ran, and every curve."""
    names = ("sequence_length", "micro_batch", "batch", "steps", "lr", "max_bytes")
    told = {
        **versions(),
        "command": command_line("fast_path_losses.py"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "model": "SmolLM2-135M as E8G1T2" if options.model else "small random Qwen3-MoE",
        "options": {name: getattr(options, name) for name in names},
    }
    options.out.write_text(json.dumps(told | {"runs": runs}) + "\n")


def deviation(a: list[float], b: list[float]) -> tuple[float, float]:
    """The mean and the largest difference of two curves, nats a token."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return statistics.fmean(differences), max(differences)


def report(runs: dict[str, Any]) -> int:
    """Print how far the curves are apart; 1 if the fast path is further from fp32 than rounding explains.

    Also 1 if the planted fault was run and is no further.
    """
    if len({run["tokens"] for run in runs.values()}) > 1:
        raise SystemExit("the runs saw different tokens: the text changed meanwhile, or the result file is another's")
    losses = {label: run["loss"] for label, run in runs.items()}
    for a, b in (
        ("fast path", "reference"),
        ("fast path", "fast path, no graph"),
        ("fast path", "reference in fp32"),
        ("reference", "reference in fp32"),
        (FAULTY, "reference in fp32"),
    ):
        if a in losses and b in losses:
            mean, largest = deviation(losses[a], losses[b])
            first = max(abs(x - y) for x, y in zip(losses[a][:10], losses[b][:10], strict=True))
            print(f"{a} | {b}: max {largest:.2e}, mean {mean:.2e}, in the first ten steps max {first:.2e} nats a token")
    if not {"fast path", "reference", "reference in fp32"} <= losses.keys():
        return 0
    distance = {a: deviation(losses[a], losses["reference in fp32"])[0] for a in losses}
    times = {a: distance[a] / distance["reference"] for a in ("fast path", FAULTY) if a in distance}
    for label, factor in times.items():
        print(f"{label}: {factor:.2f} times as far from fp32 as the reference in bf16, at most {ALLOWED} is rounding")
    return int(not times["fast path"] <= ALLOWED or times.get(FAULTY, ALLOWED + 1) <= ALLOWED)


def draw(options: argparse.Namespace) -> None:
    """The curves above, how far they are from the reference in fp32 below."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    result = json.loads(options.result.read_text())
    runs = result["runs"]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 6.5), dpi=130, sharex=True, layout="constrained")
    styles = {"fast path": "-", "reference": "--"}
    for label, style in styles.items():
        losses = runs[label]["loss"]
        steps = range(1, len(losses) + 1)
        above.plot(steps, losses, style, label=label, linewidth=1.4)
        wide = runs["reference in fp32"]["loss"]
        below.plot(steps, [abs(x - y) for x, y in zip(losses, wide, strict=True)], style, label=label, linewidth=1.0)
    mean, largest = deviation(runs["fast path"]["loss"], runs["reference"]["loss"])
    above.set(
        ylabel="loss, nats a token",
        title=f"{result['model']}, {result['device']}: max {largest:.1e}, mean {mean:.1e} nats a token apart",
    )
    below.set(xlabel="step", ylabel="distance from the reference in fp32", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, metadata={"Software": None})
    sys.exit(report(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--model", type=Path, help="a dense Hugging Face folder with its tokenizer")
    runs.add_argument("--text", nargs="+", required=True, help="files, folders or globs")
    runs.add_argument("--max-bytes", type=int, default=12_000_000)
    runs.add_argument("--sequence-length", type=int, default=512)
    runs.add_argument("--batch", type=int, default=16, help="sequences a step")
    runs.add_argument("--micro-batch", type=int, default=8)
    runs.add_argument("--steps", type=int, default=200)
    runs.add_argument("--lr", type=float, default=1e-4)
    runs.add_argument("--ways", nargs="+", choices=WAYS)
    runs.add_argument("--work", type=Path, help="where run folders lie meanwhile")
    runs.add_argument("--out", type=Path, required=True)
    draws = commands.add_parser("draw")
    draws.add_argument("result", type=Path)
    draws.add_argument("picture", type=Path)
    options = parser.parse_args()
    run(options) if options.do == "run" else draw(options)


if __name__ == "__main__":
    main()
