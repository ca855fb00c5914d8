"""Hugging Face folders in fp8 with a scale for each block, and what they mean by the plainest arithmetic there is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Block = tuple[int, int]

PUBLISHED: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""The quantization_config of DeepSeek-V3."""
_KEPT = (
    *("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "block_sparse_moe.gate", "shared_expert_gate"),
    *("shared_head.head", "eh_proj"),
)


def held(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def quantised(weight: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a matrix, or of a stack of them: the largest weight of a block becomes 448."""
    if weight.ndim == 3:
        codes, scales = zip(*(quantised(matrix, block) for matrix in weight), strict=True)
        return torch.stack(codes), torch.stack(scales)
    high, wide = block
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // high), -(-weight.shape[1] // wide))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide].float()
            scales[i, j] = part.abs().max() / 448
            codes[i * high : (i + 1) * high, j * wide : (j + 1) * wide] = (part / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def meant(codes: Tensor, scales: Tensor, block: Block, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weights that codes and scales stand for: the oracle."""
    wide = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return (codes.float() * wide[..., : codes.shape[-2], : codes.shape[-1]]).to(dtype)


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: int = 1) -> Path:
    """A Hugging Face folder of these tensors, dealt to its files in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for old in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        old.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t, file in weight_map.items() if file == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def fp8_pair(source: Path, target: Path, block: Block = (128, 128), files: int = 1) -> tuple[Path, Path]:
    """(an fp8 folder of a model, the bf16 folder that it must be read as)."""
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in held(source).items():
        if tensor.ndim < 2 or any(part in name for part in _KEPT):
            stored[name] = plain[name] = tensor.bfloat16()
            continue
        codes, scales = quantised(tensor, block)
        stored |= {name: codes, f"{name}_scale_inv": scales}
        plain[name] = meant(codes, scales, block)
    described = config | {"quantization_config": PUBLISHED | {"weight_block_size": list(block)}}
    for asset in source.glob("generation_config.json"):
        for side in ("fp8", "bf16"):
            (target / side).mkdir(parents=True, exist_ok=True)
            shutil.copy(asset, target / side)
    return (
        write_folder(target / "fp8", described, stored, files),
        write_folder(target / "bf16", config, plain, files),
    )


_WIDE: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
WIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 160,
            "shared_expert_intermediate_size": 288,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **{"num_key_value_heads": 6, "q_lora_rank": 144, "kv_lora_rank": 136, "v_head_dim": 24},
            **{"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "first_k_dense_replace": 1},
            **{"n_group": 2, "topk_group": 1},
            **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 160},
        },
    ),
}
"""transformers' classes with matrices of more than one block of 128 x 128, and of no whole number of them."""


def save_wide(name: str, folder: Path) -> Path:
    """Write WIDE[name] in fp32, its weights drawn so that no two blocks have one scale."""
    import transformers

    hf_class, more = WIDE[name]
    torch.manual_seed(3)
    config = getattr(transformers, f"{hf_class}Config")(**_WIDE | more)
    model = getattr(transformers, f"{hf_class}ForCausalLM")(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.1)
    model.save_pretrained(folder)
    return folder


Wide = Callable[[str], tuple[Path, Path]]


def wide_pairs(factory: pytest.TempPathFactory) -> Wide:
    """`wide(name)` is WIDE[name] as (fp8 folder, the bf16 folder that it means), in files. Read them, never write."""
    made: dict[str, tuple[Path, Path]] = {}

    def pair(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = factory.mktemp("fp8") / name
            made[name] = fp8_pair(save_wide(name, folder / "fp32"), folder, files=3)
        return made[name]

    return pair
