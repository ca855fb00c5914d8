"""Tiny random Hugging Face models: the real classes, one for every way in which a family can differ.

Every size is chosen to break a wrong assumption: the vocabulary is no multiple of 128, heads are shared
by groups, Qwen3's head_dim is not hidden_size / heads, the sliding window is shorter than the sequence,
no norm is one, no bias is zero, and attention is sharp enough that a wrong rope base shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor

from tests.tiny_families import FURTHER
from tests.tiny_further import add_further_layers
from tests.tiny_model import TinyModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB_SIZE = 250
NUM_LAYERS = 4
SEQUENCE_LENGTH = 24

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "rms_norm_eps": 1e-6,
}
_QWEN3_MOE: dict[str, Any] = {
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "rms_norm_eps": 1e-6,
}
_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


TINY: dict[str, TinyModel] = {
    "llama": TinyModel(hf_class="Llama"),
    "llama_tied": TinyModel(hf_class="Llama", config={"tie_word_embeddings": True}),
    # One head is 32 wide here, so that several of its frequencies lie where the scaling acts.
    "llama_rope_scaled": TinyModel(
        hf_class="Llama",
        config={"head_dim": 32, "max_position_embeddings": 131072, "rope_parameters": _LLAMA3_ROPE},
    ),
    "mistral": TinyModel(hf_class="Mistral", config={"sliding_window": 7}),
    "mixtral": TinyModel(
        hf_class="Mixtral",
        config={"num_local_experts": 4, "num_experts_per_tok": 2},
        max_shard_size="200KB",
    ),
    "qwen2": TinyModel(hf_class="Qwen2", config={"rms_norm_eps": 1e-6}, max_shard_size="200KB"),
    "qwen2_tied": TinyModel(hf_class="Qwen2", config={"rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
    "qwen2_moe": TinyModel(hf_class="Qwen2Moe", config=_QWEN2_MOE, max_shard_size="300KB"),
    "qwen2_moe_normalised": TinyModel(hf_class="Qwen2Moe", config=_QWEN2_MOE | {"norm_topk_prob": True}),
    # Layers 1 and 3 are mixtures.
    "qwen2_moe_sparse": TinyModel(hf_class="Qwen2Moe", config=_QWEN2_MOE | {"decoder_sparse_step": 2}),
    "qwen3": TinyModel(hf_class="Qwen3", config={"head_dim": 16, "rms_norm_eps": 1e-6}),
    "qwen3_moe": TinyModel(hf_class="Qwen3Moe", config=_QWEN3_MOE | {"norm_topk_prob": True}, max_shard_size="300KB"),
    "qwen3_moe_unnormalised": TinyModel(hf_class="Qwen3Moe", config=_QWEN3_MOE | {"norm_topk_prob": False}),
    # Layers 1, 2 and 3 are mixtures.
    "qwen3_moe_dense_first": TinyModel(
        hf_class="Qwen3Moe", config=_QWEN3_MOE | {"norm_topk_prob": True, "mlp_only_layers": [0]}
    ),
}


EVERY = TINY | FURTHER
"""TINY goes through every test of the engine, FURTHER through the oracles of families."""


def token_ids(batch: int = 2, length: int = SEQUENCE_LENGTH) -> Tensor:
    """The text of every test: the same random tokens [batch, length] each time."""
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(5))


def build_tiny(name: str, more_layers: int = 0) -> PreTrainedModel:
    """The fp32 model EVERY[name], in eval mode; its weights depend on the name alone (and on `more_layers`)."""
    import transformers

    variant = EVERY[name]
    sizes = {key: value for key, value in _SIZES.items() if key not in variant.without}
    sizes["num_hidden_layers"] += more_layers
    config = getattr(transformers, f"{variant.hf_class}Config")(**sizes | variant.config)
    config._attn_implementation = "eager"
    config.dtype = torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    _fill(model, torch.Generator().manual_seed(crc32(name.encode())))
    return model


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write EVERY[name] as a Hugging Face folder of safetensors files; returns the folder."""
    model = build_tiny(name).to(dtype)
    model.save_pretrained(folder, max_shard_size=EVERY[name].max_shard_size)
    if count := EVERY[name].further_layers:
        add_further_layers(folder, build_tiny(name, more_layers=count).to(dtype), NUM_LAYERS)
    return folder


def reference_logits(source: PreTrainedModel | Path, tokens: Tensor) -> Tensor:
    """What transformers computes in fp32 with plain attention: logits [batch, length, VOCAB_SIZE]."""
    if isinstance(source, Path):
        from transformers import AutoModelForCausalLM

        source = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    _clamp_as_told(source)
    with torch.no_grad():
        return source(tokens, use_cache=False).logits


def _clamp_as_told(model: PreTrainedModel) -> None:
    """Before 5.23 transformers' experts of GPT-OSS clamp at 7.0, whatever `swiglu_limit` their config.json tells."""
    limit = getattr(model.config, "swiglu_limit", None)
    for module in model.modules():
        if limit is not None and hasattr(module, "gate_up_proj_bias"):
            module.limit = limit


# Sharp attention and decided routers; any sharper (2.0), and another order of summation costs 5e-6 of a logit.
_SCALES = {
    **{"q_proj": 1.4, "qkv_proj": 1.2, "k_proj": 1.4, "mlp.gate.": 2.0},
    **{"q_b_proj": 1.4, "kv_a_proj": 1.4, "kv_b_proj": 1.4},
}


def _fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every weight so that each one matters: a scale per kind, found by its name."""
    around = 0 if model.config.model_type.startswith(("gemma", "nemotron")) else 1  # what these norms add to one
    with torch.no_grad():
        for name, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(around * (not name.endswith("bias")) + 0.3 * drawn)
            elif "embed_tokens" in name:
                weight.copy_(0.1 * drawn)  # small, so that the norms' epsilon is felt
            else:
                scale = next((scale for part, scale in _SCALES.items() if part in name), 0.6)
                weight.copy_(scale * weight.shape[-1] ** -0.5 * drawn)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
