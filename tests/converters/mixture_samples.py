"""What a text does in the mixtures of a written folder, seen in transformers' own class by hooks on its norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from ckptbridge.converters.model import Model
from ckptbridge.converters.upcycling.measured import MixtureSample
from ckptbridge.trainer.router import Router
from tests.tiny import token_ids


def samples(model: Model, folder: Path) -> dict[int, MixtureSample]:
    """A sample of each mixture in `folder`, which `model` was opened from; the text is every test's."""
    loaded = load(folder)
    return {
        layer: sample(model, layer, router_inputs(loaded, layer))
        for layer in range(model.config.num_layers)
        if model.config.is_moe_layer(layer)
    }


def sample(model: Model, layer: int, input_TH: Tensor) -> MixtureSample:
    """What the router of one layer makes of these inputs."""
    router = Router(model.config)
    stem = f"decoder.layers.{layer}.mlp.router."
    router.load_state_dict({name: model.tensors[stem + name].read() for name, _ in router.named_parameters()})
    experts = model.config.num_moe_experts or 0
    with torch.no_grad():
        routing = router(input_TH)
    met_TK = routing.experts_TK
    return MixtureSample(
        layer=layer,
        input_TH=input_TH,
        rows_N=met_TK.flatten().bincount(minlength=experts),
        weights_N=torch.zeros(experts).index_add_(0, met_TK.flatten(), routing.weights_TK.flatten()),
        logits_TN=F.linear(input_TH, router.weight.detach(), None if router.bias is None else router.bias.detach()),
    )


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def router_inputs(loaded: PreTrainedModel, layer: int) -> Tensor:
    """[T, H]: what the router of a layer sees of the text."""
    seen: list[Tensor] = []
    keep: Callable[..., None] = lambda module, args, output: seen.append(output.flatten(0, -2))  # noqa: E731
    handle = loaded.model.layers[layer].post_attention_layernorm.register_forward_hook(keep)
    with torch.no_grad():
        loaded(token_ids(), use_cache=False)
    handle.remove()
    return seen[0]
