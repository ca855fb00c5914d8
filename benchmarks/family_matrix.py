"""Every family, and what is proved of it: the page docs/families.md, made by one command.

    python benchmarks/family_matrix.py                       # prints the table
    python benchmarks/family_matrix.py --only gemma2 --only deepseek_v3
    python benchmarks/family_matrix.py --write               # docs/families.md and results/families.json too

For each tiny variant of a family: whether the table names exactly what the transformers class saves; how many tensors
come back bit for bit through torch_dist and legacy torch, on one rank and cut; the largest difference of fp32 logits
between transformers and our decoder on the converted side; and the same for the real megatron-core, where its stock
GPTModel computes the family, over the layouts named. For each published configuration: how many tensors of the real
class at full size, built on the meta device, the table names. A cell that fails says so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers

from ckptbridge import __version__
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.registry import FAMILIES, family_of
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.megatron.launch import Run, compute
from ckptbridge.trainer.megatron.layouts import layout_name
from tests.converters.published import PUBLISHED
from tests.converters.test_every_family import tensors_of
from tests.converters.test_families import config_object, saved_names, table
from tests.megatron.launch import MEGATRON, check_fetched
from tests.megatron.test_megatron_families import layouts_of
from tests.tiny import EVERY, reference_logits, save_tiny, token_ids

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
ROUND_TRIPS = (("torch_dist", False), ("torch_dist", True), ("torch", False), ("torch", True))


@dataclass(slots=True)
class Row:
    """What was found of one tiny variant. A text in place of a number says why there is none."""

    family: str
    variant: str
    names: str = ""
    round_trip: str = ""
    ours: float | str = ""
    megatron: float | str = ""
    layouts: tuple[str, ...] = ()


@dataclass(slots=True)
class FullSize:
    """What was found of one published configuration."""

    family: str
    model: str
    tensors: int
    parameters: float
    agrees: bool


@dataclass(slots=True)
class Matrix:
    rows: list[Row] = field(default_factory=list)
    full: list[FullSize] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def names_of(folder: Path) -> str:
    """Whether the table names exactly what the class saved, shapes included."""
    saved = {key: tuple(tensor.shape) for key, tensor in tensors_of(folder).items()}
    model = open_model(folder)
    made = {key: s for move in model.family.moves(model.config) for key, s in zip(move.hf, move.hf_shapes, strict=True)}
    made |= {copy: made[original] for copy, original in model.family.copied(model.config).items()}
    if made != saved:
        raise ValueError(f"{len(made.keys() ^ saved.keys())} names differ")
    return f"{len(made)}"


def round_trips(folder: Path, is_moe: bool, work: Path) -> str:
    """How many tensors came back with the same bits, over both formats and two layouts each."""
    before, same = tensors_of(folder), 0
    for number, (to, is_split) in enumerate(ROUND_TRIPS):
        layout = ParallelLayout(tp=2, pp=2, ep=2 if is_moe else 1) if is_split else ParallelLayout()
        there, back = work / f"there{number}", work / f"back{number}"
        execute(plan_conversion(open_model(folder), there, to, ConvertOptions(layout=layout)))  # type: ignore[arg-type]
        execute(plan_conversion(open_model(there), back, "hf", ConvertOptions()))
        after = tensors_of(back)
        if after.keys() != before.keys():
            raise ValueError(f"{to}: other names came back")
        same += sum(torch.equal(after[n].view(torch.uint8), t.view(torch.uint8)) for n, t in before.items())
    if same != len(ROUND_TRIPS) * len(before):
        raise ValueError(f"{same} of {len(ROUND_TRIPS) * len(before)} tensors came back")
    return f"{same} of {len(ROUND_TRIPS) * len(before)}"


@torch.no_grad()
def ours(folder: Path, work: Path) -> float:
    """The largest difference of our decoder's logits, on the converted side, from transformers'."""
    source = open_model(work / "there0")
    decoder = empty_decoder(source.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(source.tensors, source.config))
    logits = decoder.logits(decoder(token_ids()).hidden_BSH)
    return (logits - reference_logits(folder, token_ids())).abs().max().item()


def megatron(name: str, folder: Path, work: Path, row: Row) -> float | str:
    """The largest difference of the real megatron-core's logits over all layouts, every key read."""
    if EVERY[name].not_in_megatron:
        return EVERY[name].not_in_megatron
    layouts = layouts_of(name)
    row.layouts = tuple(layout_name(layout) for layout in layouts)
    ids = token_ids(batch=1)[0]
    expected = reference_logits(folder, ids[None])[0]
    model, worst = open_model(work / "there1"), 0.0
    for done in compute([Run(model=model, layout=layout) for layout in layouts], ids, torch.float32, work):
        if done.missing_keys or done.unexpected_keys:
            raise ValueError(f"missing {done.missing_keys}, unread {done.unexpected_keys}")
        worst = max(worst, (done.logits_TV - expected).abs().max().item())
    return worst


def full_size(name: str) -> FullSize:
    """The table against the real class at the published size, on the meta device."""
    config = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(config_object(config))
    expected, made = saved_names(model), table(config)
    count = sum(torch.Size(shape).numel() for shape in made.values())
    beside = {key for key in made if key not in expected}
    return FullSize(
        family_of(config, name).name,
        name,
        len(made),
        count / 1e9,
        agrees=all(made.get(key) == shape for key, shape in expected.items())
        and not beside - mtp_names(config, beside),
    )


def mtp_names(config: dict[str, object], names: set[str]) -> set[str]:
    """Of these names, those of the layers behind the last one: published files have them, classes ignore them."""
    last = config.get("num_hidden_layers")
    return {name for name in names if name.startswith(f"model.layers.{last}.")}


def attempt(matrix: Matrix, what: str, work: Callable[[], float | str]) -> float | str:
    try:
        return work()
    except Exception as error:
        matrix.failed.append(f"{what}: {error}")
        return f"FAILED: {str(error).splitlines()[0][:80]}"


def measured_row(name: str, family: str, folder: Path, work: Path, matrix: Matrix) -> Row:
    """All cells of a variant's row; what fails is told in its cell and in the matrix."""
    row, is_moe = Row(family, name), EVERY[name].is_moe
    row.names = str(attempt(matrix, f"{name}, names", lambda: names_of(folder)))
    row.round_trip = str(attempt(matrix, f"{name}, round trip", lambda: round_trips(folder, is_moe, work)))
    row.ours = attempt(matrix, f"{name}, ours", lambda: ours(folder, work))
    row.megatron = attempt(matrix, f"{name}, megatron-core", lambda: megatron(name, folder, work, row))
    return row


def measure(only: list[str]) -> Matrix:
    matrix = Matrix()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    check_fetched()
    sys.path.insert(0, str(MEGATRON))
    for name in EVERY:
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            folder = save_tiny(name, work / "hf")
            family = open_model(folder).family.name
            if only and family not in only:
                continue
            start = time.perf_counter()
            row = measured_row(name, family, folder, work, matrix)
            matrix.rows.append(row)
            print(
                f"{name:<28}{row.names:>6}{row.round_trip:>14}  {shown(row.ours):>10}  {shown(row.megatron)}"
                f"   {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    for name, config in PUBLISHED.items():
        if only and family_of(config, name).name not in only:
            continue
        try:
            found = full_size(name)
        except Exception as error:
            matrix.failed.append(f"{name}, full size: {error}")
            continue
        if not found.agrees:
            matrix.failed.append(f"{name}, full size: the names differ")
        matrix.full.append(found)
        print(
            f"{name:<40}{found.tensors:>8} tensors{found.parameters:>10.1f} B  {'same' if found.agrees else 'DIFFER'}"
        )
    return matrix


def shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1e}"


def lines_of(family: Family) -> int:
    """Lines of the family's file, without blank ones."""
    stem = {"gemma3_text": "gemma3", "granitemoe": "granite"}.get(family.name, family.name)
    file = ROOT / "converters" / "families" / f"{stem}.py"
    return sum(bool(line.strip()) for line in file.read_text().splitlines())


def page(matrix: Matrix, seconds: float) -> str:
    """docs/families.md."""
    worst = max((row.ours for row in matrix.rows if isinstance(row.ours, float)), default=0.0)
    lines = [
        "# Families",
        "",
        "Made by `python benchmarks/family_matrix.py --write` "
        f"({seconds / 60:.0f} minutes on {os.cpu_count()} cores) on {datetime.date.today().isoformat()}: ckptbridge "
        f"{__version__}, transformers {transformers.__version__}, torch {torch.__version__}, megatron-core 0.19.2.",
        "",
        "*Names*: tensors of the tiny model that the table names, exactly those that the class saves. *Round trip*:",
        "tensors that come back bit for bit, over torch_dist and legacy torch, each on one rank and cut (TP 2, PP 2,",
        "EP 2). *Ours* and *megatron-core*: the largest difference of fp32 logits from transformers', on the converted",
        "side, by our decoder and by the real megatron-core (one rank, TP 2, PP 2, EP 2; every key read), or why its",
        f"stock GPTModel is not asked. The largest of ours is {worst:.1e}; 1e-5 is the bound.",
        "",
        "| family | variant | names | round trip | ours = transformers | megatron-core = transformers |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.family} | {row.variant} | {row.names} | {row.round_trip} | {shown(row.ours)} | {shown(row.megatron)} |"
        for row in matrix.rows
    ]
    lines += [
        "",
        "## At full size",
        "",
        "Published configurations, against the real class on the meta device; layers that the class ignores",
        "(multi-token prediction) are counted, and named as published.",
        "",
        "| model | family | tensors | parameters | names |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {full.model} | {full.family} | {full.tensors} | {full.parameters:.1f} B "
        f"| {'same' if full.agrees else 'DIFFER'} |"
        for full in matrix.full
    ]
    lines += ["", "## Lines of code", "", "| family | class | lines |", "|---|---|---|"]
    lines += [f"| {family.name} | {family.architecture} | {lines_of(family)} |" for family in FAMILIES]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="a family; may be given several times")
    parser.add_argument("--write", action="store_true", help="write docs/families.md and results/families.json")
    options = parser.parse_args()
    start = time.perf_counter()
    matrix = measure(options.only)
    seconds = time.perf_counter() - start
    if options.write:
        PAGE.write_text(page(matrix, seconds))
        told = {
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
            "command": " ".join(["python", "benchmarks/family_matrix.py", *sys.argv[1:]]),
            "versions": {
                "ckptbridge": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "megatron-core": "0.19.2",
            },
            "seconds": round(seconds, 1),
            **asdict(matrix),
        }
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{seconds:.0f} s")
    if matrix.failed:
        raise SystemExit("\n".join(["these failed:", *matrix.failed]))


if __name__ == "__main__":
    main()
