"""AdamW over fp32 main weights, with the gradient norm that it clips by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ckptbridge.converters.tensors import Checkpoint
from ckptbridge.trainer.loading import load_tensors
from ckptbridge.trainer.recipe import OptimizerSection

STATE = ("param", "exp_avg", "exp_avg_sq")
"""What is saved of each parameter, in Megatron-Core's words: the fp32 main weight and Adam's two moments."""


class Optimizer:
    """Updates a model's parameters from gradients that are summed in fp32.

    Of fp32 parameters the main weight is the parameter itself. Other dtypes get an fp32 copy: gradients are added
    to the copy's as soon as autograd has them (so that many micro-batches do not round away), the copy is updated,
    and the parameter is its rounding. Megatron's rule of decay: vectors (norms, biases) are not decayed, every
    matrix is.
    """

    def __init__(self, model: nn.Module, options: OptimizerSection) -> None:
        self.clip_grad = options.clip_grad
        self._parameters = dict(model.named_parameters())
        self.main = {name: _main_weight(parameter) for name, parameter in self._parameters.items()}
        matrices = [main for main in self.main.values() if main.ndim > 1]
        vectors = [main for main in self.main.values() if main.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # fused: one pass over weight, gradient and moments instead of one for each of Adam's ten operations.
        self._adam = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=options.betas, eps=options.eps, fused=True
        )

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, forget the gradients. Returns the norm before clipping."""
        gradients = [main.grad for main in self.main.values() if main.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))).item()
        if self.clip_grad and norm > self.clip_grad:
            torch._foreach_mul_(gradients, self.clip_grad / (norm + 1e-6))
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._round()
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Main weights and moments by parameter name, fp32. Zeros for moments before the first step."""
        moments = {main: self._adam.state.get(main, {}) for main in self.main.values()}
        return {
            "param": {name: main.detach() for name, main in self.main.items()},
            **{
                key: {name: moments[main].get(key, torch.zeros_like(main)) for name, main in self.main.items()}
                for key in STATE[1:]
            },
        }

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Start from a checkpoint's weights, in fp32 where it has them; parameters follow the main weights."""
        load_tensors(self.main, checkpoint)
        self._round()

    def load(self, state: Mapping[str, Checkpoint], step: int) -> None:
        """Take over what `state` returned after `step` steps; the model's parameters follow the main weights.

        Raises BadInputError if names or shapes are not this model's.
        """
        load_tensors(self.main, state["param"])
        moments = {
            key: {name: torch.empty_like(main, requires_grad=False) for name, main in self.main.items()}
            for key in STATE[1:]
        }
        for key, tensors in moments.items():
            load_tensors(tensors, state[key])
        for name, main in self.main.items():
            self._adam.state[main] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=main.device),
                **{key: tensors[name] for key, tensors in moments.items()},
            }
        self._round()

    def _round(self) -> None:
        """Parameters that are no main weights themselves become the rounding of theirs."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                if self.main[name] is not parameter:
                    parameter.copy_(self.main[name])


def _main_weight(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    main = parameter.detach().float().requires_grad_()

    def collect(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if main.grad is None:
            main.grad = parameter.grad.float()
        else:
            main.grad += parameter.grad
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(collect)
    return main
