"""This package's trainer: its decoder, its accumulation of gradients, its optimizer, its captured step."""

from __future__ import annotations

import gc

import torch
from peers.program import Options, random_tokens
from slices import Slice
from torch import Tensor

from ckptbridge import __version__
from ckptbridge.kernels.backend import choose_backend
from ckptbridge.trainer.activation_memory import spare_memory
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder
from ckptbridge.trainer.memory_plan import plan_run
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection, Recipe
from ckptbridge.trainer.step import accumulate_gradients
from ckptbridge.trainer.step_graph import StepGraph
from ckptbridge.trainer.update import Update

_AUX_LOSS_COEFF = 1e-2
_LR = 1e-5


class Ours:
    """A decoder of random weights, updated as a run of the trainer would."""

    def __init__(self, slice_: Slice, options: Options) -> None:
        choice = choose_backend(options.backend, options.device)
        self.decoder = random_decoder(slice_, choice.name, options)
        spare_memory(self.decoder, recompute=options.recompute, offload=False)
        moments = "bf16" if options.moments == torch.bfloat16 else "fp32"
        self.optimizer = Optimizer(
            self.decoder,
            OptimizerSection(lr=_LR, moments=moments, norm_in_products=options.norm_in_products),
        )
        shape = (slice_.micro_batch_size, slice_.sequence_length + 1)
        self.batch_BS = random_tokens(shape, slice_.config.vocab_size, torch.device("cpu"))
        self.parameters = sum(parameter.numel() for parameter in self.decoder.parameters())
        self.update: Update | None = Update(
            self.decoder,
            self.optimizer,
            micro_batch_size=slice_.micro_batch_size,
            aux_loss_coeff=_AUX_LOSS_COEFF,
            graph="auto" if options.graph else "off",
        )
        self.device, self.wants_graph = options.device, options.graph
        self.planned_gib = round(
            plan_run(slice_.config, recipe_of(slice_, moments, options.recompute), options.device).total / 2**30, 2
        )
        self._alone: StepGraph[Tensor] | None = None
        self.kernels = f"ckptbridge {__version__}, {choice.name} kernels, fp32 main weights, {moments} moments"
        if options.recompute != "none":
            self.kernels += f", {options.recompute} recompute"
        if options.norm_in_products:
            self.kernels += ", norm in products"

    @property
    def description(self) -> str:
        sentence = self.update.graph_sentence if self.update else None
        return f"{self.kernels}; {sentence or 'steps are not captured yet'}"

    def step(self) -> Tensor:
        if self.update is None:
            raise ValueError("steps are timed before forward and backward alone, which gives the captured step away")
        return torch.tensor(self.update.take(self.batch_BS, _LR).loss)

    def forward_backward(self) -> Tensor:
        if self.update is not None:
            self.update = None  # two captured graphs would hold activations twice
            gc.collect()
            torch.cuda.empty_cache()
            self.batch_BS = self.batch_BS.to(self.device)
            if self.device.type == "cuda" and self.wants_graph:
                self._alone = StepGraph(self._gradients, self.device, forget=self.optimizer.forget_gradients)
        return self._gradients() if self._alone is None else self._alone()

    def _gradients(self) -> Tensor:
        self.optimizer.forget_gradients()  # the first ones of this call overwrite
        return accumulate_gradients(self.decoder, self.batch_BS, len(self.batch_BS), _AUX_LOSS_COEFF).loss


def recipe_of(slice_: Slice, moments: str, recompute: str) -> Recipe:
    """What a recipe of such steps would say, for the memory planner."""
    return Recipe.model_validate(
        {
            "run_folder": ".",
            "model": {"init_from": slice_.name},
            "data": {
                "text": ["."],
                "sequence_length": slice_.sequence_length,
                "micro_batch_size": slice_.micro_batch_size,
                "global_batch_size": slice_.micro_batch_size,
            },
            "optimizer": {"moments": moments},
            "memory": {"recompute": recompute},
            "schedule": {"total_steps": 1},
            "precision": "bf16",
        }
    )


@torch.no_grad()
def random_decoder(slice_: Slice, backend: str, options: Options) -> Decoder:
    """Weights as a model begins with: matrices of the config's spread, norms of one, biases of zero."""
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    decoder = empty_decoder(slice_.config, backend, dtype, options.device)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, slice_.config.init_method_std, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return decoder
