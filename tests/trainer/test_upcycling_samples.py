"""What is sampled of each layer, against hooks on transformers' own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.model import open_model
from ckptbridge.converters.upcycling.measured import MixtureSample, MlpSample
from ckptbridge.trainer.upcycling.samples import sample_mixtures, sample_mlps
from tests.conftest import TinyFolders
from tests.tiny import NUM_LAYERS, build_tiny, token_ids

TOLERANCE = 1e-5


def hooked(name: str, modules: dict[str, str]) -> dict[str, list[Tensor]]:
    """Inputs (`in`) and outputs (`out`) of a module of each of transformers' layers, tokens in one row."""
    network = build_tiny(name)
    seen: dict[str, list[Tensor]] = {key: [] for key in modules}
    for layer in network.model.layers:
        for key, path in modules.items():
            where, _, side = path.partition(" ")

            def hook(module: Any, inputs: Any, output: Any, key: str = key, side: str = side) -> None:
                found = inputs[0] if side == "in" else output
                seen[key].append(found.detach().reshape(-1, found.shape[-1]))

            layer.get_submodule(where).register_forward_hook(hook)
    with torch.no_grad():
        network(token_ids(), use_cache=False)
    return seen


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "nemotron", "olmo2"])
def test_an_mlp_is_sampled_as_transformers_computes_it(name: str, tiny_folder: TinyFolders) -> None:
    samples: list[MlpSample] = []
    sample_mlps(open_model(tiny_folder(name)), list(token_ids()), samples.append)
    # Where a norm stands behind the MLP, what joins the stream comes out of it.
    after = {"gemma2": "post_feedforward_layernorm out", "olmo2": "post_feedforward_layernorm out"}
    seen = hooked(name, {"input": "mlp in", "hidden": "mlp.down_proj in", "output": after.get(name, "mlp out")})
    assert [sample.layer for sample in samples] == list(range(NUM_LAYERS))
    for sample in samples:
        for found, expected in (
            (sample.input_TH, seen["input"]),
            (sample.hidden_TF, seen["hidden"]),
            (sample.output_TH, seen["output"]),
        ):
            scale = max(1.0, expected[sample.layer].abs().max().item())
            assert (found - expected[sample.layer]).abs().max() <= TOLERANCE * scale
            assert not found.requires_grad


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_dense_first", "glm4_moe"])
def test_a_mixture_is_sampled_as_transformers_computes_it(name: str, tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder(name))
    samples: list[MixtureSample] = []
    sample_mixtures(model, list(token_ids()), samples.append)
    assert [sample.layer for sample in samples] == [n for n in range(NUM_LAYERS) if model.config.is_moe_layer(n)]
    seen = hooked(name, {"input": "mlp in"})["input"]
    experts, topk = model.config.num_moe_experts or 0, model.config.moe_router_topk
    for sample in samples:
        tokens = token_ids().numel()
        assert (sample.input_TH - seen[sample.layer]).abs().max() <= TOLERANCE
        rows = model.tensors[f"decoder.layers.{sample.layer}.mlp.router.weight"].read()
        logits = sample.input_TH.double() @ rows.double().T
        assert (sample.logits_TN - logits).abs().max() <= TOLERANCE * logits.abs().max()
        assert sample.rows_N.sum() == tokens * topk
        if model.config.moe_router_enable_expert_bias:
            bias = model.tensors[f"decoder.layers.{sample.layer}.mlp.router.expert_bias"].read()
            chosen = (logits.sigmoid() + bias).topk(topk).indices
            weights = logits.sigmoid().gather(1, chosen)
        else:
            weights, chosen = logits.softmax(-1).topk(topk)
        weights = weights / weights.sum(-1, keepdim=True) * (model.config.moe_router_topk_scaling_factor or 1)
        spread = torch.zeros(experts, dtype=torch.float64).index_add(0, chosen.flatten(), weights.flatten())
        assert torch.equal(sample.rows_N, torch.bincount(chosen.flatten(), minlength=experts))
        assert (sample.weights_N - spread).abs().max() <= TOLERANCE * tokens


def test_a_dense_layer_of_a_mixture_is_sampled_too(tiny_folder: TinyFolders) -> None:
    samples: list[MlpSample] = []
    sample_mlps(open_model(tiny_folder("qwen3_moe_dense_first")), list(token_ids()), samples.append)
    assert [sample.layer for sample in samples] == [0]
