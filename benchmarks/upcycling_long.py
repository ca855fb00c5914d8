"""Continued pretraining at a size that says something: dense, exact, cube-root and drop mixtures, 20M tokens each.

    python benchmarks/upcycling_long.py run --model FOLDER --text code 'SITE-PACKAGES/**/*.py' --text english FOLDER \\
        --work /tmp/long --out benchmarks/results/upcycling-long.jsonl
    python benchmarks/upcycling_long.py draw benchmarks/results/upcycling-long.jsonl docs/pictures/upcycling-long.png

Every variant of a text and a seed sees the same tokens in the same order, with one optimizer and schedule, and is
measured on the same held-out documents. All mixtures have four copies of each MLP, of which a token meets two: as 8
halves of which 4 (E4G2T4), or as 4 wholes of which 2 (Drop-Upcycling does not cut). So they cost the same.
A line of JSON is written when a run is done, and runs that the file has are not taken again: a budget of seconds,
given again and again, finishes all. A run is not started if the last ones say that it would not end in time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import command_line, versions
from training import records_of

from ckptbridge.trainer.recipe import Recipe

_HALVES = {"num_experts": 8, "granularity": 2, "topk": 4}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "E4G2T4 exact": _HALVES,
    "E4G2T4 cube root": _HALVES | {"scaling": "paper"},
    "E4G1T2 drop 0.5": {"num_experts": 4, "topk": 2, "method": "drop"},
}
"""The cube root on each matrix is He et al.'s (arXiv 2410.07524) and Megatron-Core's; half of each expert drawn anew is
Drop-Upcycling's (arXiv 2502.19261)."""
_GUESS = {"dense": 150.0}
_GUESS_MIXTURE = 260.0
"""Seconds of a first run, of which nothing is known."""


def recipe_of(options: argparse.Namespace, text: list[str], variant: str, seed: int, folder: Path) -> Recipe:
    """The recipe of one run."""
    spec = VARIANTS[variant]
    return Recipe.model_validate(
        {
            "run_folder": str(folder),
            "model": {"init_from": str(options.model)} | ({"upcycle": {**spec, "seed": seed}} if spec else {}),
            "data": {
                "text": text,
                "sequence_length": options.sequence_length,
                "micro_batch_size": options.micro_batch,
                "global_batch_size": options.batch,
                "max_bytes": options.max_bytes,
                "seed": seed,
            },
            "optimizer": {"lr": options.lr},
            "schedule": {
                "total_steps": -(-options.tokens // (options.sequence_length * options.batch)),
                "warmup_steps": options.warmup,
                "min_lr": options.lr / 10,
            },
            "moe": {"aux_loss_coeff": 1e-2},
            "evaluation": {"every": options.evaluate_every, "batches": options.evaluation_batches},
            "export": {"hf": False},
            "precision": options.precision,
            "seed": seed,
        }
    )


def run(options: argparse.Namespace) -> None:
    """Every case that the file lacks, until the budget is spent."""
    started = time.perf_counter()
    rows = rows_of(options.out)
    done = {(row["text"], row["variant"], row["seed"]) for row in rows}
    texts = {name: patterns for name, *patterns in options.text}
    for seed, (text, patterns), variant in product(options.seeds, texts.items(), options.variants or VARIANTS):
        if (text, variant, seed) in done:
            continue
        left = options.budget - (time.perf_counter() - started)
        needed = seconds_of(variant, rows, options.tokens)
        if needed > left:
            print(f"{text}, {variant}, seed {seed}: {needed:.0f} s are needed, {left:.0f} are left", flush=True)
            continue
        row = measured(options, text, patterns, variant, seed)
        rows.append(row)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(sentence(row), flush=True)


def seconds_of(variant: str, rows: list[dict[str, Any]], tokens: int) -> float:
    """How long a run of this variant takes, by the slowest so far, and a tenth more."""
    alike = [row["seconds"] / row["tokens"] for row in rows if row["variant"] == variant]
    if not alike:
        return _GUESS.get(variant, _GUESS_MIXTURE) * tokens / 20e6
    return 1.1 * max(alike) * tokens


def measured(options: argparse.Namespace, text: str, patterns: list[str], variant: str, seed: int) -> dict[str, Any]:
    """One run's row. Token files stay in the work folder for the next variant of this text and seed."""
    started = time.perf_counter()
    folder = options.work / f"{text}-{seed}"
    records = records_of(recipe_of(options, patterns, variant, seed, folder))
    steps = [record for record in records if "loss" in record]
    names = ("sequence_length", "micro_batch", "batch", "lr", "warmup", "max_bytes", "evaluation_batches", "precision")
    index = json.loads((folder / "tokens" / "index.json").read_text())
    return {
        "text": text,
        "variant": variant,
        "seed": seed,
        "upcycle": VARIANTS[variant],
        "tokens": steps[-1]["tokens"],
        "text_tokens": {"train": index["train"], "held_out": index["held_out"]},
        "held_out": [
            [record.get("tokens", 0), record["held_out_loss"]] for record in records if "held_out_loss" in record
        ],
        "loss": [[record["tokens"], round(record["loss"], 4)] for record in steps[:: options.evaluate_every]],
        "busiest_expert": [
            [record["tokens"], max(record["expert_load"]["max"])]
            for record in steps[:: options.evaluate_every]
            if "expert_load" in record
        ],
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in steps),
        "peak_gib": round(max(record["peak_memory_bytes"] for record in steps) / 2**30, 2),
        "seconds": round(time.perf_counter() - started, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "options": {name: getattr(options, name) for name in names},
        "command": command_line("upcycling_long.py"),
        **versions(),
    }


def rows_of(file: Path) -> list[dict[str, Any]]:
    """What a result file holds."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()] if file.exists() else []


def sentence(row: dict[str, Any]) -> str:
    losses = [loss for _, loss in row["held_out"]]
    return (
        f"{row['text']:<9}{row['variant']:<18}seed {row['seed']}: {losses[0]:8.4f} before, {losses[-1]:.4f} after "
        f"{row['tokens'] / 1e6:.1f}M tokens; {row['tokens_per_s'] / 1e3:.0f}k tokens/s, {row['seconds']:.0f} s"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Held-out loss before and after, a row a text and variant, a column a seed."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "| text | variant | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---|---|" + "---|" * len(seeds),
    ]
    for text, variant in dict.fromkeys((row["text"], row["variant"]) for row in rows):
        cells = []
        for seed in seeds:
            found = [row for row in rows if (row["text"], row["variant"], row["seed"]) == (text, variant, seed)]
            losses = [loss for _, loss in found[-1]["held_out"]] if found else []
            cells.append(f"{losses[0]:.3f} -> {losses[-1]:.4f}" if losses else "")
        lines.append(f"| {text} | {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(options: argparse.Namespace) -> None:
    """A column a text: above all curves, below those near the dense model's; dashed is a second seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = rows_of(options.result)
    texts = [*dict.fromkeys(row["text"] for row in rows)]
    seeds = sorted({row["seed"] for row in rows})
    colours = dict(zip(VARIANTS, ("black", "tab:blue", "tab:orange", "tab:red"), strict=True))
    figure, grid = pyplot.subplots(
        2, len(texts), figsize=(6 * len(texts), 8), dpi=130, layout="constrained", squeeze=False, sharex=True
    )
    for column, text in enumerate(texts):
        above, below = grid[0][column], grid[1][column]
        mine = [row for row in rows if row["text"] == text]
        for row in mine:
            tokens, losses = zip(*row["held_out"], strict=True)
            is_first = row["seed"] == seeds[0]
            for axes in (above, below):
                axes.plot(
                    [count / 1e6 for count in tokens],
                    losses,
                    color=colours[row["variant"]],
                    linestyle="-" if is_first else "--",
                    linewidth=1.4,
                    label=f"{row['variant']}: {losses[0]:.3f} -> {losses[-1]:.3f}" if is_first else None,
                )
        dense = [row["held_out"] for row in mine if row["variant"] == "dense"]
        if dense:
            losses = [loss for curve in dense for _, loss in curve]
            below.set_ylim(min(loss for row in mine for _, loss in row["held_out"]) - 0.02, max(losses) * 1.1)
        above.set(title=text, yscale="log", ylabel="held-out loss, nats a token")
        above.yaxis.set_major_formatter("{x:g}")
        above.yaxis.set_minor_formatter("{x:g}")
        below.set(xlabel="million tokens", ylabel="held-out loss, nats a token")
        above.legend(fontsize=8, frameon=False)
        for axes in (above, below):
            axes.grid(alpha=0.3)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, metadata={"Software": None})
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="do", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--model", type=Path, required=True, help="a dense Hugging Face folder with its tokenizer")
    runs.add_argument("--text", nargs="+", action="append", required=True, help="a name, then files, folders or globs")
    runs.add_argument("--tokens", type=int, default=20_000_000)
    runs.add_argument("--max-bytes", type=int, default=80_000_000)
    runs.add_argument("--sequence-length", type=int, default=1024)
    runs.add_argument("--batch", type=int, default=32, help="sequences a step")
    runs.add_argument("--micro-batch", type=int, default=32)
    runs.add_argument("--lr", type=float, default=1e-4)
    runs.add_argument("--warmup", type=int, default=20)
    runs.add_argument("--evaluate-every", type=int, default=10)
    runs.add_argument("--evaluation-batches", type=int, default=2)
    runs.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    runs.add_argument("--variants", nargs="+", choices=VARIANTS)
    runs.add_argument("--work", type=Path, required=True, help="where token files and logs lie meanwhile")
    runs.add_argument("--budget", type=float, default=540, help="seconds in all")
    runs.add_argument("--out", type=Path, required=True, help="a file of JSON lines, added to")
    draws = commands.add_parser("draw")
    draws.add_argument("result", type=Path)
    draws.add_argument("picture", type=Path)
    options = parser.parse_args()
    run(options) if options.do == "run" else draw(options)


if __name__ == "__main__":
    sys.exit(main())
