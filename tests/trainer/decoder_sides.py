"""One batch through transformers' model and through the trainer's decoder; and faults to plant in the decoder.

Shapes: B sequences, S sequence length, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn

from ckptbridge.converters.hf_folder import HfFolder
from ckptbridge.converters.model import Model, decoder_tensors, model_of_folder
from ckptbridge.converters.tensors import InMemory
from ckptbridge.kernels.backend import Backend
from ckptbridge.kernels.main_gradient import MainGradient, main_gradient_of
from ckptbridge.kernels.routing import Routes
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.router import Router
from ckptbridge.trainer.step import accumulate_gradients


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in a Hugging Face folder, and the tokens [B, S + 1] that it is run on."""

    name: str
    folder: Path
    batch: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """A loss, gradients by the decoder's parameter names, and of each mixture the sorted choices [B * S, K]."""

    loss: float
    gradients: dict[str, Tensor]
    choices: list[Tensor]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to a decoder whose weights are loaded, and to the config that it is built from."""

    plant: Callable[[Decoder, ExitStack], None] = lambda decoder, stack: None
    epsilon_factor: float = 1.0
    needs_experts: bool = False
    is_large: bool = False
    """Whether it shows in bf16 where some tokens meet other experts, too."""


def theirs(
    subject: Subject, model: Model, dtype: torch.dtype, device: torch.device, *, is_plain: bool, micro_batches: int = 1
) -> Outcome:
    """What transformers computes: by its plainest code for attention and experts, or by what it takes by itself."""
    code: dict[str, str] = {"attn_implementation": "eager", "experts_implementation": "eager"} if is_plain else {}
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(subject.folder, dtype=dtype, **code)
    hf, batch, seen = hf.to(device).eval(), subject.batch.to(device), list[list[Tensor]]()
    modules: list[nn.Module] = list(hf.modules())
    for module in modules:
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):  # a stack of experts
            seen.append([])
            module.register_forward_pre_hook(partial(_keep_their_choices, seen[-1], batch.shape[1]), with_kwargs=True)
    total = 0.0
    for part in batch.chunk(micro_batches):
        loss: Tensor = hf(input_ids=part, labels=part, use_cache=False).loss * (len(part) / len(batch))
        loss.backward()
        total += loss.item()
    held = dict(hf.named_parameters())  # a tied head is not among them
    found = {name: parameter.grad.float() for name, parameter in held.items()}
    found |= {name: buffer for name, buffer in hf.state_dict().items() if name.endswith("e_score_correction_bias")}
    on_disk = HfFolder(subject.folder, model.hf_config, {n: InMemory(t.cpu()) for n, t in found.items()}, ())
    packed = decoder_tensors(model_of_folder(on_disk).tensors, model.config)
    gradients = {n: tensor.read() for n, tensor in packed.items() if not n.endswith("router.expert_bias")}
    return Outcome(total, gradients, [torch.cat(of_layer).sort(-1).values for of_layer in seen])


def ours(
    subject: Subject, model: Model, dtype: torch.dtype, device: torch.device, backend: Backend, fault: Fault
) -> Outcome:
    """What the trainer computes of two micro-batches with a fault planted; `Fault()` is none."""
    config = replace(model.config, layernorm_epsilon=fault.epsilon_factor * model.config.layernorm_epsilon)
    decoder = empty_decoder(config, backend, dtype, device)
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    seen: list[list[Tensor]] = []
    for module in decoder.modules():
        if isinstance(module, Router):
            seen.append([])
            module.register_forward_hook(partial(_keep_choices, seen[-1]))
    Optimizer(decoder, OptimizerSection())  # gives every weight a main gradient
    with ExitStack() as stack:
        fault.plant(decoder, stack)
        result = accumulate_gradients(decoder, subject.batch.to(device), -(-len(subject.batch) // 2), 0.0)
    sums = {name: main_gradient_of(parameter) for name, parameter in decoder.named_parameters()}
    gradients = {name: main.finish().cpu() for name, main in sums.items() if main is not None}
    return Outcome(result.loss.item(), gradients, [torch.cat(of_layer).sort(-1).values for of_layer in seen])


def _keep_their_choices(
    kept: list[Tensor], length: int, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> None:
    """Of every token but the last, whose loss nobody knows; our decoder does not see it."""
    experts: Tensor = named["top_k_index"] if "top_k_index" in named else inputs[1]
    kept.append(experts.view(-1, length, experts.shape[-1])[:, :-1].flatten(0, 1).cpu())


def _keep_choices(kept: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], routes: Routes) -> None:
    kept.append(routes.experts_TK.detach().cpu())


def _lose_a_micro_batch(decoder: Decoder, stack: ExitStack) -> None:
    """Every contribution overwrites the one before."""

    def target(self: MainGradient) -> tuple[Tensor, bool]:
        self.is_filled = True
        return self.tensor, False

    stack.enter_context(patch.object(MainGradient, "target", target))


@torch.no_grad()
def _scale_attention(factor: float, decoder: Decoder, stack: ExitStack) -> None:
    number = decoder.config.num_layers // 2
    decoder.get_parameter(f"decoder.layers.{number}.self_attention.linear_proj.weight").mul_(factor)


@torch.no_grad()
def _swap_experts(decoder: Decoder, stack: ExitStack) -> None:
    number = decoder.config.num_layers - 1
    weight = decoder.get_parameter(f"decoder.layers.{number}.mlp.experts.experts.linear_fc2.weight")
    weight[:2] = weight[:2].flip(0)


_ALWAYS = {
    "fc2 of two experts swapped": Fault(_swap_experts, needs_experts=True),
    "a micro-batch's gradients lost": Fault(_lose_a_micro_batch, is_large=True),
}
FAULTS: dict[torch.dtype, dict[str, Fault]] = {
    torch.float32: {
        "one layer's attention 1 % larger": Fault(partial(_scale_attention, 1.01)),
        "epsilon of norms tenfold": Fault(epsilon_factor=10.0),
        **_ALWAYS,
    },
    torch.bfloat16: {"one layer's attention a third larger": Fault(partial(_scale_attention, 4 / 3)), **_ALWAYS},
}
"""What each precision has to find. Gradients move by 1e-3 to 1e-2 in the two that bf16 is not asked for."""
