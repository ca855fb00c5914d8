"""Seconds and peak memory of `ckptbridge plan` for DeepSeek-V3 (671B, and 11.5B that predict a further token).

    python benchmarks/plan.py
    python benchmarks/plan.py --write

The source is what a Hub id gives before any shard is fetched: the published config.json, and an index of 163 files that
names 91,991 tensors: every weight, the scales of those that are fp8, and the copies of embedding and output layer in
layer 61. Each command is a whole process, Python's start included; its output goes to a file. Processor seconds are
printed too: other work on the machine lengthens the wall time, and them less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from math import prod
from pathlib import Path

from measuring import RESULTS, command_line, machine_in_words, measure, versions, write_result

from ckptbridge.converters.fields import read_config
from ckptbridge.converters.fp8_folder import without_quantisation
from ckptbridge.converters.registry import family_named

SHARDS = 163
UNEVEN = "--decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 2"
LAYOUTS = ("--tp 1 --pp 1 --ep 1", f"--tp 8 --pp 16 --ep 8 {UNEVEN}", f"--tp 8 --pp 16 --ep 64 --etp 1 {UNEVEN}")
"""61 layers do not split over 16 stages: the first has 3, the last 2, the others 4."""

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head")
"""What is bf16 in the published files; all other weights are fp8."""


def write_announcement(folder: Path) -> tuple[int, int]:
    """config.json and the index of a folder without shards. Returns (parameters, tensors)."""
    family = family_named("deepseek_v3")
    config = read_config(family.fields, without_quantisation(CONFIG), "config.json", ())
    shapes = {n: s for move in family.moves(config) for n, s in zip(move.hf, move.hf_shapes, strict=True)}
    parameters = sum(map(prod, shapes.values()))
    shapes |= {copy: shapes[original] for copy, original in family.copied(config).items()}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        is_kept = any(part in name for part in KEPT)
        sizes[name] = (2 if is_kept else 1) * prod(shape)
        if not is_kept:
            sizes[f"{name}_scale_inv"] = 4 * prod(-(-size // 128) for size in shape)
    total, at = sum(sizes.values()), 0
    weight_map: dict[str, str] = {}
    for name, size in sizes.items():
        weight_map[name] = f"model-{1 + at * SHARDS // total:05d}-of-{SHARDS:06d}.safetensors"
        at += size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return parameters, len(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="each one word, e.g. '--tp 8 --ep 8'")
    parser.add_argument("--write", action="store_true", help=f"write the result into {RESULTS.name}/")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        result = run(options, Path(work))
    if options.write:
        write_result("plan-671b.json", result)


def run(options: argparse.Namespace, work: Path) -> dict[str, object]:
    source = work / "hf"
    source.mkdir()
    parameters, tensors = write_announcement(source)
    index_nbytes = (source / "model.safetensors.index.json").stat().st_size
    print(f"{parameters / 1e9:.1f}B parameters, {tensors} tensors in {SHARDS} files, index {index_nbytes / 1e6:.1f} MB")
    print(f"{'':<26}{'median s':>9}{'min':>7}{'max':>7}{'CPU s':>7}{'peak GiB':>10}{'output MB':>11}")
    rows: dict[str, object] = {}
    for layout in options.layouts:
        for flag in ("", "--json"):
            words = [*layout.split(), *([flag] if flag else [])]
            command = [sys.executable, "-m", "ckptbridge", "plan", "hf2mcore", str(source), str(work / "dst"), *words]
            taken = [measure(command, output=work / "output", is_quiet=True) for _ in range(options.runs)]
            seconds, processor = [one.seconds for one in taken], [one.processor_seconds for one in taken]
            peak = max(one.peak_gib for one in taken)
            printed = (work / "output").stat().st_size
            print(
                f"{' '.join([*words[:6], flag]):<26}{statistics.median(seconds):>9.2f}{min(seconds):>7.2f}"
                f"{max(seconds):>7.2f}{min(processor):>7.2f}{peak:>10.2f}{printed / 1e6:>11.1f}"
            )
            rows[" ".join(words)] = {
                "seconds": seconds,
                "median_s": statistics.median(seconds),
                "processor_s": processor,
                "peak_gib": peak,
                "output_nbytes": printed,
            }
    return {
        **versions(),
        "machine": machine_in_words(),
        "command": command_line("plan.py"),
        "parameters": parameters,
        "tensors": tensors,
        "index_nbytes": index_nbytes,
        "runs": rows,
    }


if __name__ == "__main__":
    main()
