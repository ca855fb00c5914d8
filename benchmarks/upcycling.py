"""SmolLM2 upcycled in every way: how far the mixture is from the dense model, and Megatron-Core's own upcycling beside.

    make demo && .venv/bin/python benchmarks/upcycling.py --write

Losses are nats a token in fp32 on three fixed texts (see smollm2.py): by transformers on the Hugging Face folder that
was written, by our decoder on the torch_dist checkpoint, and, where Megatron-Core is found, by its own model. The peer
is Megatron-Core's `upcycle_state_dict` on the same weights and texts (megatron_upcycling.py). Speed and memory of the
command are in upcycling_speed.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from measuring import RESULTS, command_line, provenance, write_result
from smollm2 import texts

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.torch_dist_reader import iteration_folder
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.converters.upcycling.targets import mixture_config
from ckptbridge.demo.model import dense_model
from ckptbridge.trainer.megatron.config import transformer_config
from ckptbridge.trainer.tokens import load_tokenizer
from ckptbridge.trainer.verify import VerifyReport, verify

MEGATRON = Path(".cache/megatron-core-0.19.2")
TOKENS = 1024

EXACT: dict[str, dict[str, Any]] = {
    "E8G1T2": {"num_experts": 8, "topk": 2},
    "E4G4T4": {"num_experts": 16, "topk": 4, "granularity": 4},
    "E8G8T8": {"num_experts": 64, "topk": 8, "granularity": 8},
    "E4G2T4": {"num_experts": 8, "topk": 4, "granularity": 2},
    "E4G4T4, groups permuted": {"num_experts": 16, "topk": 4, "granularity": 4, "permute": True},
    "E4G2T4 + shared half": {"num_experts": 8, "topk": 4, "granularity": 2, "shared": "partition"},
    "E4G2T4 + shared whole / 2": {"num_experts": 8, "topk": 4, "granularity": 2, "shared": "overlap"},
    "E4G4T4, sigmoid": {"num_experts": 16, "topk": 4, "granularity": 4, "router": "sigmoid"},
    "E4G4T8, sigmoid, groups": {
        "num_experts": 16,
        "topk": 8,
        "granularity": 4,
        "router": "sigmoid",
        "router_groups": True,
    },
    "E8G1T2, every second layer": {"num_experts": 8, "topk": 2, "layers": "1::2", "to": "qwen2_moe"},
    "E4G4T4, pre-softmax, zero router": {
        "num_experts": 16,
        "topk": 4,
        "granularity": 4,
        "router": "pre-softmax",
        "router_std": 0.0,
        "to": "qwen2_moe",
    },
}
PEERS = {"E8G1T2": (8, 2, 1), "E4G4T4": (16, 4, 4), "E8G8T8": (64, 8, 8)}
"""(N, T, G) of what Megatron-Core's function can be asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hub id or a folder; default: SmolLM2-135M from its wheel")
    parser.add_argument("--only", nargs="+", default=[*EXACT], choices=[*EXACT], metavar="CASE")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--no-megatron", action="store_true", help="leave Megatron-Core's own model and function out")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = run(options, Path(name))
    if options.write:
        write_result("upcycling.json", result)


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    hf, described = dense_model(options.model, work / "hf")
    dense = open_model(hf)
    if not options.no_megatron:
        sys.path.insert(0, str(MEGATRON.resolve()))  # verify's ranks look where this process does
    print(f"{described}; |loss - dense loss| of the worst text:")
    print(f"{'':<34}{'class':<22}{'HF':>10}{'our decoder':>13}{'megatron-core':>15}")
    cases: dict[str, Any] = {}
    for name in options.only:
        cases[name] = exact_case(dense, EXACT[name], options, work / "case")
        print(line(name, cases[name]), flush=True)
    peers: dict[str, Any] = {}
    if not options.no_megatron:
        execute(plan_conversion(dense, work / "mcore", "torch_dist"))
        print("\nMegatron-Core's own upcycle_state_dict: loss of the dense model and of its mixture, by text")
        for name, numbers in PEERS.items():
            for pre_softmax in (False, True):
                label = f"{name}{', pre-softmax' if pre_softmax else ''}"
                peers[label] = rows = peer(dense, numbers, pre_softmax, options, work)
                print(f"{label:<34}" + "   ".join(f"{r['dense_loss']:.4f} -> {r['mixture_loss']:.4f}" for r in rows))
    return {
        **provenance(command_line("upcycling.py")),
        "transformers": transformers.__version__,
        "megatron-core": None if options.no_megatron else "0.19.2",
        "exact": cases,
        "megatron_upcycling": peers,
    }


def exact_case(dense: Model, spec: dict[str, Any], options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One mixture written both ways and compared with the dense folder by each engine."""
    with tempfile.TemporaryDirectory(prefix=work.name, dir=work.parent) as name:
        folder = Path(name)
        mixture = upcycled(dense, UpcycleSpec(**spec))
        execute(plan_conversion(mixture, folder / "hf", "hf"))
        execute(plan_conversion(mixture, folder / "mcore", "torch_dist"))
        row: dict[str, Any] = {
            "class": mixture.family.architecture,
            "hf": summary(verify(dense.path, folder / "hf", text, options.tokens) for text in texts().values()),
            "decoder": summary(verify(dense.path, folder / "mcore", text, options.tokens) for text in texts().values()),
        }
        if not options.no_megatron and _is_told(mixture):
            row["megatron"] = summary(
                verify(dense.path, folder / "mcore", text, options.tokens, engine="megatron")
                for text in texts().values()
            )
    return row


def _is_told(mixture: Model) -> bool:
    """Whether megatron-core's model can be told to compute it: it ranks groups of experts by more than two of them."""
    try:
        transformer_config(mixture.config)
    except NotSupportedError:
        return False
    return True


def summary(reports: Iterable[VerifyReport]) -> dict[str, Any]:
    """The worst of the texts, and each text's losses."""
    made = list(reports)
    return {
        "losses": [(report.loss_a, report.loss_b) for report in made],
        "worst_loss_difference": max(report.loss_difference for report in made),
        "max_abs_logit_difference": max(report.max_abs_logit_difference for report in made),
        "max_relative_logit_difference": max(report.max_relative_logit_difference for report in made),
        "least_argmax_agreement": min(report.argmax_agreement for report in made),
    }


def line(name: str, row: dict[str, Any]) -> str:
    megatron = row.get("megatron")
    cells = [row["hf"], row["decoder"], *([megatron] if megatron else [])]
    numbers = "".join(
        f"{cell['worst_loss_difference']:>{width}.1e}" for cell, width in zip(cells, (10, 13, 15), strict=False)
    )
    worst = max(cell["max_relative_logit_difference"] for cell in cells)
    return f"{name:<34}{row['class'].removesuffix('ForCausalLM'):<22}{numbers}   logits {worst:.1e} of the largest"


def peer(
    dense: Model, numbers: tuple[int, int, int], pre_softmax: bool, options: argparse.Namespace, work: Path
) -> list[dict[str, float]]:
    """What Megatron-Core makes of the same model: a line for each text."""
    experts, topk, granularity = numbers
    router = "pre-softmax" if pre_softmax else "renormalised"
    spec = UpcycleSpec(num_experts=experts, topk=topk, granularity=granularity, router=router).resolved()
    family = upcycled(dense, UpcycleSpec(num_experts=experts, topk=topk, granularity=granularity)).family
    tokenizer = load_tokenizer(dense.path)
    licence = (Path(__file__).parents[1] / "trainer/verify_text.txt").read_text()
    ids = [
        tokenizer(licence if text is None else text, add_special_tokens=False)["input_ids"][: options.tokens]
        for text in texts().values()
    ]
    job = work / "peer.json"
    job.write_text(
        json.dumps(
            {
                "dense": str(iteration_folder(work / "mcore")),
                "dense_config": transformer_config(dense.config),
                "mixture_config": transformer_config(mixture_config(dense.config, spec, family)),
                "token_ids": ids,
                "vocab_size": dense.config.vocab_size,
            }
        )
    )
    script = Path(__file__).with_name("megatron_upcycling.py")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(MEGATRON.resolve()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
        "PYTHONWARNINGS": "ignore",
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run([sys.executable, str(script), str(job)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
