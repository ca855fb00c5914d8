"""A llama-architecture GGUF file as a Hugging Face folder: weights dequantised, row order restored.

llama.cpp stores the rows of q and k of each head interleaved (0, D/2, 1, D/2 + 1, ...), because its RoPE
turns neighbouring pairs; Hugging Face turns row i with row i + D/2. Quantisation runs along a row, so whole
rows are put back in order while they are still quantised.

N heads, G query groups, D head dim, H hidden_size, F ffn_hidden_size, V vocab.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ckptbridge.converters.errors import BadInputError, NotSupportedError, StorageError
from ckptbridge.converters.gguf_header import GgufHeader, GgufTensor, read_header
from ckptbridge.converters.gguf_tokenizer import tokenizer_files
from ckptbridge.converters.hf_folder import SINGLE
from ckptbridge.converters.safetensors_header import make_header
from ckptbridge.converters.tensors import Computed, LazyTensor, Stored

KNOWN_ARCHITECTURES = ("llama",)
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_CHUNK_BYTES = 1 << 21  # written at a time; NumPy's intermediates take about 15 times that
_ROPE_FACTORS = "rope_freqs.weight"


def gguf_to_hf(gguf_file: Path, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a GGUF model as a Hugging Face folder (config, weights, tokenizer) and return the folder.

    The default bf16 is what published checkpoints are. Dequantised values (scale * q + min) have more bits
    than that: `dtype=torch.float32` keeps them exactly, at twice the size. The folder appears whole or not
    at all.

    Raises NotSupportedError for another architecture, tokenizer or tensor type and when the `gguf` package
    is missing, BadInputError for a damaged or contradicting file, StorageError when the disk fails.
    """
    if dtype not in _DTYPES:
        raise NotSupportedError(f"cannot write {dtype}; known: {', '.join(_DTYPES.values())}")
    if folder.exists():
        raise BadInputError(f"{folder}: exists already; remove it or name another folder")
    header = read_header(gguf_file)
    try:
        config = _hf_config(header, dtype)
        tensors = _hf_tensors(gguf_file, header, config, dtype)
        tokenizer = tokenizer_files(header.metadata, config["max_position_embeddings"])
    except BadInputError as error:
        raise type(error)(f"{gguf_file}: {error}") from error
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": json.dumps(_token_ids(header.metadata), indent=2) + "\n",
        **tokenizer,
    }
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        _write_safetensors(partial / SINGLE, tensors)
        partial.rename(folder)
    except OSError as error:
        raise StorageError(f"{partial}: cannot be written: {error.strerror}; what is there is incomplete") from error
    return folder


def _hf_config(header: GgufHeader, dtype: torch.dtype) -> dict[str, Any]:
    metadata = header.metadata
    if (architecture := metadata.get("general.architecture")) not in KNOWN_ARCHITECTURES:
        raise NotSupportedError(f"architecture {architecture!r} is not known; known: {', '.join(KNOWN_ARCHITECTURES)}")
    if metadata.get("llama.expert_count"):
        raise NotSupportedError("a mixture of experts in GGUF is not known here; take the model's Hugging Face folder")
    if (scaling := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise NotSupportedError(f"llama.rope.scaling.type {scaling!r} is not known; known: 'none'")

    def integer(key: str, default: int | None = None) -> int:
        value = metadata.get(f"llama.{key}", default)
        if not isinstance(value, int) or value < 1:
            raise BadInputError(f"metadata llama.{key} is {value!r}: a positive integer was expected")
        return value

    n, h = integer("attention.head_count"), integer("embedding_length")
    d = integer("attention.key_length", integer("rope.dimension_count", h // n))
    if integer("rope.dimension_count", d) != d:
        raise NotSupportedError(
            f"llama.rope.dimension_count differs from the head's {d}: RoPE on a part is not known here"
        )
    if d % 2:
        raise BadInputError(f"a head is {d} wide: RoPE turns pairs, so an even width was expected")
    num_tokens = len(metadata.get("tokenizer.ggml.tokens", []))
    if (v := integer("vocab_size", num_tokens)) < num_tokens:
        raise BadInputError(f"the tokenizer has {num_tokens} tokens, but llama.vocab_size is {v}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **_token_ids(metadata),
        "head_dim": d,
        "hidden_act": "silu",
        "hidden_size": h,
        "initializer_range": 0.02,
        "intermediate_size": integer("feed_forward_length"),
        "max_position_embeddings": integer("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": n,
        "num_hidden_layers": integer("block_count"),
        "num_key_value_heads": integer("attention.head_count_kv", n),
        "rms_norm_eps": _decimal(metadata, "llama.attention.layer_norm_rms_epsilon", 1e-5),
        "rope_scaling": None,
        "rope_theta": _decimal(metadata, "llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "torch_dtype": _DTYPES[dtype],
        "use_cache": True,
        "vocab_size": v,
    }


def _decimal(metadata: Mapping[str, Any], key: str, default: float) -> float:
    """The short decimal that a stored fp32 came from: 1e-05, not 9.999999747378752e-06."""
    value = metadata.get(key, default)
    if not isinstance(value, float):
        raise BadInputError(f"metadata {key} is {value!r}: a number was expected")
    return float(str(np.float32(value)))


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Row:
    hf_name: str
    shape: tuple[int, ...]
    is_interleaved: bool = False


def _rows(config: Mapping[str, Any]) -> dict[str, _Row]:
    """What every GGUF tensor of such a model is called and shaped in Hugging Face's folder."""
    h, f, v, d = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["head_dim"]
    n, g = config["num_attention_heads"], config["num_key_value_heads"]
    layer = {
        "attn_norm": _Row("input_layernorm", (h,)),
        "attn_q": _Row("self_attn.q_proj", (n * d, h), is_interleaved=True),
        "attn_k": _Row("self_attn.k_proj", (g * d, h), is_interleaved=True),
        "attn_v": _Row("self_attn.v_proj", (g * d, h)),
        "attn_output": _Row("self_attn.o_proj", (h, n * d)),
        "ffn_norm": _Row("post_attention_layernorm", (h,)),
        "ffn_gate": _Row("mlp.gate_proj", (f, h)),
        "ffn_up": _Row("mlp.up_proj", (f, h)),
        "ffn_down": _Row("mlp.down_proj", (h, f)),
    }
    rows = {"token_embd.weight": _Row("model.embed_tokens.weight", (v, h))}
    for i in range(config["num_hidden_layers"]):
        for name, row in layer.items():
            rows[f"blk.{i}.{name}.weight"] = _Row(
                f"model.layers.{i}.{row.hf_name}.weight", row.shape, row.is_interleaved
            )
    rows["output_norm.weight"] = _Row("model.norm.weight", (h,))
    if not config["tie_word_embeddings"]:
        rows["output.weight"] = _Row("lm_head.weight", (v, h))
    return rows


def _hf_tensors(path: Path, header: GgufHeader, config: dict[str, Any], dtype: torch.dtype) -> dict[str, LazyTensor]:
    rows = _rows(config)
    missing = [name for name in rows if name not in header.tensors]
    unknown = [name for name in header.tensors if name not in rows and name != _ROPE_FACTORS]
    if missing or unknown:
        raise BadInputError(
            f"tensors missing: {', '.join(missing) or 'none'}; tensors that a llama of "
            f"{config['num_hidden_layers']} layers does not have: {', '.join(unknown) or 'none'}"
        )
    if _ROPE_FACTORS in header.tensors:
        factors = _dequantised(path, header.tensors[_ROPE_FACTORS], torch.float32).read().numpy()
        config["rope_scaling"] = _llama3_scaling(factors, config["rope_theta"], config["head_dim"])
    tensors: dict[str, LazyTensor] = {}
    for name, row in rows.items():
        stored = header.tensors[name]
        if stored.shape != row.shape:
            raise BadInputError(f"tensor {name} is {list(stored.shape)}, but the metadata says {list(row.shape)}")
        head_dim = config["head_dim"] if row.is_interleaved else None
        tensors[row.hf_name] = _dequantised(path, stored, dtype, head_dim)
    return tensors


def _dequantised(path: Path, tensor: GgufTensor, dtype: torch.dtype, head_dim: int | None = None) -> LazyTensor:
    """The tensor's values, rows of each head in Hugging Face's order when `head_dim` is given."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ModuleNotFoundError as error:
        raise NotSupportedError("dequantising GGUF needs the gguf package: pip install 'ckptbridge[demo]'") from error
    try:
        kind = GGMLQuantizationType(tensor.kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise NotSupportedError(f"tensor {tensor.name} has ggml type {tensor.kind}: {error}") from error
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    columns = tensor.shape[-1]
    num_rows = prod(tensor.shape) // columns
    if columns % block_elements:
        raise BadInputError(
            f"tensor {tensor.name}: rows of {columns} are no whole blocks of {block_elements} ({kind.name})"
        )
    stored = Stored(path, tensor.offset, (num_rows, columns // block_elements * block_bytes), torch.uint8)
    if (end := tensor.offset + stored.nbytes) > (size := path.stat().st_size):
        raise BadInputError(f"tensor {tensor.name} ends at byte {end}, but the file has {size}: it is truncated")

    def values(start: int, stop: int) -> torch.Tensor:
        if head_dim is None:
            rows = stored.read_rows(start, stop).numpy()
        else:
            low, high = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
            order = np.arange(high - low).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
            rows = stored.read_rows(low, high).numpy()[order[start - low : stop - low]]
        return torch.from_numpy(dequantize(rows, kind)).to(dtype)

    if len(tensor.shape) == 1:
        return Computed(tensor.shape, dtype, lambda start, stop: values(0, 1)[0, start:stop])
    return Computed(tensor.shape, dtype, values)


def _llama3_scaling(divisors: NDArray[np.float32], rope_theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, found again from each frequency's divisor and checked against all."""
    factor, low, high, original = round(float(divisors.max()), 3), 1.0, 4.0, 8192
    wavelengths = 2 * np.pi * rope_theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - kept) / factor + kept)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise NotSupportedError(
            f"{_ROPE_FACTORS} is not Llama 3.1's scaling (low 1, high 4, 8192 positions): no other is known"
        )
    return {
        "factor": factor,
        "high_freq_factor": high,
        "low_freq_factor": low,
        "original_max_position_embeddings": original,
        "rope_type": "llama3",
    }


def _write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    with path.open("wb") as file:
        file.write(make_header(tensors)[0])
        for tensor in tensors.values():
            step = max(1, _CHUNK_BYTES // tensor.row_nbytes)
            for start in range(0, tensor.shape[0], step):
                chunk = tensor.read_rows(start, min(start + step, tensor.shape[0]))
                file.write(chunk.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
