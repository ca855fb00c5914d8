"""The whole decoder against transformers' own models: the loss, and the gradient of every parameter.

    PYTHONPATH=. python benchmarks/decoder_agreement.py --model SMOLLM2 --out result.json    on a GPU if there is one
    PYTHONPATH=. python benchmarks/decoder_agreement.py --quick                              tiny models alone

All weights are bf16 numbers, so that both precisions compute one model. Our side is what the trainer runs: the kernels
that `choose_backend` takes, main gradients in fp32, two micro-batches. Gradients of transformers are turned into
Megatron's layout by the converters' own tables, as weights are: those maps are linear.

fp32 (no TF32): the loss, and the error |ours - theirs| / |theirs| of every gradient, may be `FP32_ALLOWED`. Where two
runs of transformers itself in fp32 (the plain code; and its own choice of code, in two micro-batches) are further apart
than that in some parameter, ours may be `SPREAD_ALLOWED` times that far apart in one, still not in the mean.
bf16: two correct programs differ, each rounds in its own places. The truth is transformers in fp32; our errors may be
`ALLOWED` times those of transformers in bf16 in the mean over all parameters and in any matrix. A vector (one norm's
weight, one bias) is a few hundred numbers that each sum over all tokens, whose errors by chance add up or do not: two
runs of transformers itself in bf16, the plain code and its own choice, differ by some factor in the worst of them, and
ours may be `ALLOWED` times that factor off.
A near-tie between experts may fall otherwise in bf16, in either program, and a token that meets another expert moves
gradients more than roundings do. The share of such choices is reported, and where there are any only the mean is asked
for, and only large faults are planted. Every mixture runs a second time with as many choices as experts ("all
experts"): none can fall otherwise there. Every fault planted in our side has to be found. Exits with 1 if anything is
not as it should be. (TRITON_INTERPRET=1 with `--backend triton` is for fp32: the interpreter cuts bf16 off, and is
twice as far from the truth as rounding.)
"""

from __future__ import annotations

import argparse
import glob
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from measuring import command_line, machine_in_words, versions
from small_model import save_small_model
from torch import Tensor

from ckptbridge.converters.model import open_model
from ckptbridge.kernels.backend import BACKENDS, Backend, choose_backend
from ckptbridge.trainer.tokens import load_tokenizer
from tests.tiny import EVERY, VOCAB_SIZE, save_tiny
from tests.trainer.decoder_sides import FAULTS, Fault, Outcome, Subject, ours, theirs

FP32_ALLOWED = 1e-5
SPREAD_ALLOWED = 2.0
ALLOWED = 1.5
"""Errors in the mean over dozens of parameters and more: what the choice of places to round may make of them."""
LOSS_ALLOWED = 2.0**-8
"""Of the loss in bf16: a rounding of one number. Its error may be zero by chance, so no ratio is asked of it."""
TINY_MODELS = ("llama", "qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3_saved")
"""Of tests/tiny.py; the fourth has a shared expert, the last latent attention and sigmoid scores."""
_NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
HEADER = (
    "| model | fp32: loss | mean gradient | worst, transformers' | bf16: loss, transformers' | mean gradient | median "
    "| worst | mean ratio | worst ratio | spread of vectors | other experts | faults found | |\n" + "|---" * 14 + "|"
)


def distance(found: Outcome, truth: Outcome, device: torch.device) -> dict[str, Any]:
    """How far one program is from the truth; `by_name` are relative errors of gradients."""
    if found.gradients.keys() != truth.gradients.keys():
        raise SystemExit(f"gradients of one side only: {sorted(found.gradients.keys() ^ truth.gradients.keys())}")
    by_name: dict[str, float] = {}
    for name, expected in truth.gradients.items():
        a, b = (gradient.to(device).double() for gradient in (found.gradients[name], expected))
        by_name[name] = (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()
    differing = [(a != b).any(-1).double().mean().item() for a, b in zip(found.choices, truth.choices, strict=True)]
    worst, name = max((error, name) for name, error in by_name.items())
    return {
        "loss": found.loss,
        "loss_error": abs(found.loss - truth.loss) / truth.loss,
        "mean": statistics.fmean(by_name.values()),
        "median": statistics.median(by_name.values()),
        "worst": worst,
        "worst_name": name,
        "vectors": [name for name, gradient in truth.gradients.items() if gradient.ndim < 2],
        "tokens_with_other_experts": statistics.fmean(differing) if differing else None,
        "by_name": by_name,
    }


def is_right_in_fp32(found: dict[str, Any], spread: dict[str, Any]) -> bool:
    """Where `spread` is between two runs of transformers. Comparisons with NaN are false, here and below."""
    allowed = max(FP32_ALLOWED, SPREAD_ALLOWED * spread["worst"])
    is_near = found["loss_error"] <= FP32_ALLOWED and found["mean"] <= FP32_ALLOWED
    return is_near and all(error <= allowed for error in found["by_name"].values())


def vector_spread(one: dict[str, Any], other: dict[str, Any]) -> float:
    """How many times larger one program's error is than the other's, either way, in the worst of all vectors."""
    pairs = [(one["by_name"][name], other["by_name"][name]) for name in one["vectors"]]
    return max(max(a, b) / min(a, b) for a, b in pairs)


def is_right_in_bf16(found: dict[str, Any], other: dict[str, Any], spread: float) -> bool:
    """Against transformers in bf16, of which two runs differ by `spread` in vectors; writes the ratios into `found`."""
    ratios = {name: found["by_name"][name] / error for name, error in other["by_name"].items()}
    found["worst_ratio"], found["worst_ratio_name"] = max((ratio, name) for name, ratio in ratios.items())
    found["mean_ratio"] = found["mean"] / other["mean"]
    is_near = has_other_experts(found, other) or all(
        ratio <= ALLOWED * (spread if name in found["vectors"] else 1.0) for name, ratio in ratios.items()
    )
    return is_near and found["mean_ratio"] <= ALLOWED and found["loss_error"] <= LOSS_ALLOWED


def has_other_experts(*sides: dict[str, Any]) -> bool:
    return any(side["tokens_with_other_experts"] for side in sides)


def compared(subject: Subject, device: torch.device, backend: Backend) -> dict[str, Any]:
    """Everything about one model; `failed` names what is not as it should be."""
    model = open_model(subject.folder)
    if model.dtype != torch.bfloat16:
        raise SystemExit(f"{subject.folder}: expected weights in bf16, found {model.dtype}")
    truth = theirs(subject, model, torch.float32, device, is_plain=True)
    again = theirs(subject, model, torch.float32, device, is_plain=False, micro_batches=2)
    spread = distance(again, truth, device)
    other = distance(theirs(subject, model, torch.bfloat16, device, is_plain=False), truth, device)
    plain = distance(theirs(subject, model, torch.bfloat16, device, is_plain=True), truth, device)
    other["vector_spread"] = vector_spread(plain, other)

    def of_ours(dtype: torch.dtype, fault: Fault) -> dict[str, Any]:
        made = distance(ours(subject, model, dtype, device, backend, fault), truth, device)
        is_fp32 = dtype == torch.float32
        made["passed"] = (
            is_right_in_fp32(made, spread) if is_fp32 else is_right_in_bf16(made, other, other["vector_spread"])
        )
        return made

    result: dict[str, Any] = {"tokens": subject.batch[:, 1:].numel(), "true_loss": truth.loss}
    planted: dict[str, Any] = {}
    for key, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        sound = result[key] = of_ours(dtype, Fault())
        for label, fault in FAULTS[dtype].items():
            is_hidden = dtype == torch.bfloat16 and has_other_experts(sound, other) and not fault.is_large
            if not is_hidden and (truth.choices or not fault.needs_experts):
                made = planted[f"{label}, {key}"] = of_ours(dtype, fault)
                del made["by_name"]
                print(f"  planted: {label}, {key}: {'NOT FOUND' if made['passed'] else 'found'}", flush=True)
    failed = [key for key in ("fp32", "bf16") if not result[key]["passed"]]
    failed += [f"not found: {label}" for label, made in planted.items() if made["passed"]]
    return result | {
        "transformers in fp32": spread,
        "transformers in bf16": other,
        "planted": planted,
        "failed": failed,
    }


def row(name: str, result: dict[str, Any]) -> str:
    """One of the table."""
    fp32, bf16, other = result["fp32"], result["bf16"], result["transformers in bf16"]
    spread = result["transformers in fp32"]
    cells = [name, f"{fp32['loss_error']:.1e}", f"{fp32['mean']:.1e}"]
    cells += [
        f"{a:.1e}, {b:.1e}" for a, b in ((fp32["worst"], spread["worst"]), (bf16["loss_error"], other["loss_error"]))
    ]
    cells += [f"{bf16[key]:.2e}, {other[key]:.2e}" for key in ("mean", "median", "worst")]
    cells += [f"{bf16['mean_ratio']:.2f}", f"{bf16['worst_ratio']:.2f}", f"{other['vector_spread']:.2f}"]
    shares = [side["tokens_with_other_experts"] for side in (bf16, other)]
    cells.append(", ".join("-" if share is None else f"{share:.2%}" for share in shares))
    planted = result["planted"].values()
    cells.append(f"{sum(not made['passed'] for made in planted)} of {len(planted)}")
    return f"| {' | '.join([*cells, '; '.join(result['failed']) or 'passed'])} |"


def text_of(folder: Path, patterns: Sequence[str], sequences: int, length: int) -> Tensor:
    """The first tokens [sequences, length + 1] of as many files; those that are too short are passed over."""
    tokenizer, rows = load_tokenizer(folder), list[list[int]]()
    for file in sorted({name for pattern in patterns for name in glob.glob(pattern, recursive=True)}):  # noqa: PTH207
        ids: list[int] = tokenizer(Path(file).read_text(encoding="utf-8")[: 16 * length], add_special_tokens=False)[
            "input_ids"
        ]
        rows += [ids[: length + 1]] if len(ids) > length else []
        if len(rows) == sequences:
            return torch.tensor(rows)
    raise SystemExit(f"{', '.join(patterns)}: found {len(rows)} texts of {length + 1} tokens, expected {sequences}")


def with_all_experts(subject: Subject) -> Subject:
    """The same weights with as many choices a token as there are experts; writes over the folder's config."""
    file = subject.folder / "config.json"
    config = json.loads(file.read_text())
    config["num_experts_per_tok"] = next(config[key] for key in _NUMBER_OF_EXPERTS if key in config)
    file.write_text(json.dumps(config))
    return Subject(f"{subject.name}, all experts", subject.folder, subject.batch)


def subjects(options: argparse.Namespace, work: Path) -> list[Subject]:
    made: list[Subject] = []
    if options.model:
        batch = text_of(options.model, options.text, options.sequences, options.length)
        made.append(Subject(options.model.name, options.model, batch))
    if not options.quick:
        small: Any = transformers.AutoModelForCausalLM.from_pretrained(save_small_model(work / "small"))
        batch = text_of(work / "small", options.text, options.sequences, options.length)
        for end in ("", "-all"):
            small.bfloat16().save_pretrained(work / f"small-bf16{end}")
            subject = Subject("small random Qwen3-MoE", work / f"small-bf16{end}", batch)
            made.append(with_all_experts(subject) if end else subject)
    drawn = torch.Generator().manual_seed(5)
    batch = torch.randint(VOCAB_SIZE, (2, 65) if options.quick else (8, 129), generator=drawn)
    for name in TINY_MODELS:
        made.append(Subject(f"tiny {name}", save_tiny(name, work / name, torch.bfloat16), batch))
        if EVERY[name].is_moe:
            folder = save_tiny(name, work / f"{name}-all", torch.bfloat16)
            made.append(with_all_experts(Subject(f"tiny {name}", folder, batch)))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder in bf16 with its tokenizer")
    parser.add_argument("--text", nargs="+", default=[f"{Path(statistics.__file__).parent}/*.py"], help="globs")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence of text")
    parser.add_argument("--quick", action="store_true", help="the tiny models on few tokens, and --model if given")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="the kernels on our side")
    parser.add_argument("--only", nargs="+", default=[""], help="models whose names contain one of these")
    parser.add_argument("--out", type=Path, help="write the result here, after every model")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = choose_backend(options.backend, device)
    result: dict[str, Any] = {
        **versions(),
        "transformers": transformers.__version__,
        "command": command_line("decoder_agreement.py"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else machine_in_words(),
        "kernels": str(kernels),
        "models": {},
    }
    rows = [HEADER]
    with tempfile.TemporaryDirectory() as name:
        for subject in subjects(options, Path(name)):
            if not any(part in subject.name for part in options.only):
                continue
            started = time.perf_counter()
            made = result["models"][subject.name] = compared(subject, device, kernels.name)
            made["seconds"] = round(time.perf_counter() - started, 1)
            rows.append(row(subject.name, made))
            print(rows[-1], flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(["", str(kernels), *rows]))
    sys.exit(int(any(made["failed"] for made in result["models"].values())))


if __name__ == "__main__":
    main()
