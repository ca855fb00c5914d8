"""A llama of 25 MB: large enough to be stopped on the way, and to be shared by several processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_sizable(folder: Path) -> Path:
    """Write the model as a Hugging Face folder of bf16 weights; returns the folder."""
    folder.mkdir(parents=True)
    hidden, ffn, vocab, layers = 256, 768, 4000, 12
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    held = {"model.embed_tokens.weight": drawn(vocab, hidden), "lm_head.weight": drawn(vocab, hidden)}
    held["model.norm.weight"] = drawn(hidden)
    for layer in range(layers):
        stem = f"model.layers.{layer}."
        held |= {f"{stem}{norm}_layernorm.weight": drawn(hidden) for norm in ("input", "post_attention")}
        held |= {f"{stem}self_attn.{part}_proj.weight": drawn(hidden, hidden) for part in "qkvo"}
        held |= {f"{stem}mlp.{part}_proj.weight": drawn(ffn, hidden) for part in ("gate", "up")}
        held[f"{stem}mlp.down_proj.weight"] = drawn(hidden, ffn)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
