"""AdamW over fp32 main weights, with the gradient norm that it clips by."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from ckptbridge.converters.tensors import Checkpoint
from ckptbridge.kernels.adam import adam_step
from ckptbridge.kernels.backend import Backend, choose_backend
from ckptbridge.kernels.gradient_norm import clip_coefficient, gradient_norm
from ckptbridge.trainer.flat_groups import flat_groups
from ckptbridge.trainer.loading import check_names_and_shapes, load_tensors
from ckptbridge.trainer.recipe import OptimizerSection

STATE = ("param", "exp_avg", "exp_avg_sq")
"""What is saved of each parameter, in Megatron-Core's words: the fp32 main weight and Adam's two moments."""
_MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Optimizer:
    """Updates a model's parameters from gradients that are summed in fp32.

    Of fp32 parameters the main weight is the parameter itself; of other dtypes it is an fp32 copy, and the parameter
    is its rounding. Every parameter that requires a gradient becomes a view of a flat buffer and gets a main
    gradient: what no operation and no backward pass contributed to in a step counts as zero. Those that require none
    are left alone. Megatron's rule of decay: norms and biases are not decayed, every matrix is.
    """

    def __init__(self, model: nn.Module, options: OptimizerSection, backend: Backend | None = None) -> None:
        """`backend` names the kernels; by default the fastest that the device of the parameters allows."""
        self._options = options
        parameters = dict(model.named_parameters())
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not trained:
            raise ValueError("optimizer: no parameter of the model requires a gradient")
        self._groups = flat_groups(
            trained,
            weight_decay=options.weight_decay,
            moments=_MOMENTS[options.moments],
            wants_squares=options.norm_in_products,
        )
        self._untrained = {name: parameter for name, parameter in parameters.items() if name not in trained}
        # An untrained weight goes into a checkpoint as it came, in fp32 though the model computes in bf16.
        main = {**self._views("main"), **{name: held.detach().float() for name, held in self._untrained.items()}}
        self.main = {name: main[name] for name in parameters}
        device = self._groups[0].main.device
        self._lr, self._step = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self._norm_backend: Backend
        self._adam_backend: Backend
        self._norm_backend, self._adam_backend = _backends(device, backend, options.moments)

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, forget the gradients. Returns the norm before clipping."""
        self._lr.fill_(lr)
        return self.step_on_device(self._lr).item()

    @torch.no_grad()
    def step_on_device(self, lr: Tensor) -> Tensor:
        """The same without waiting for the device: `lr` and the norm that it returns are scalars there.

        A CUDA graph may hold it. Each replay counts as one step and reads `lr` anew.
        """
        options = self._options
        unknown, known = zip(*(group.finish_gradient() for group in self._groups), strict=True)
        norm = gradient_norm([*chain(*unknown)], [*chain(*known)], backend=self._norm_backend)
        coefficient = clip_coefficient(norm, options.clip_grad) if options.clip_grad else None
        self._step.add_(1)
        for group in self._groups:
            adam_step(
                group.gradient,
                group.main,
                group.exp_avg,
                group.exp_avg_sq,
                group.rounded_weight,
                lr=lr,
                step=self._step,
                coefficient=coefficient,
                betas=options.betas,
                eps=options.eps,
                weight_decay=group.weight_decay,
                first=group.first,
                backend=self._adam_backend,
            )
        return norm

    def forget_gradients(self) -> None:
        """Start over with the gradients of this step."""
        for group in self._groups:
            group.forget_gradient()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Main weights (fp32) and moments (in the dtype they are kept in) by parameter name: views, no copies.

        Moments are zero before the first step, and of parameters that are not trained always.
        """
        nothing = {name: self.main[name].new_zeros(()).expand(held.shape) for name, held in self._untrained.items()}
        moments = {key: {**nothing, **self._views(key)} for key in STATE[1:]}
        return {
            "param": dict(self.main),
            **{key: {name: held[name] for name in self.main} for key, held in moments.items()},
        }

    @torch.no_grad()
    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Start from a checkpoint's weights, in fp32 where it has them; parameters follow the main weights."""
        load_tensors(self.main, checkpoint)
        self._round()

    @torch.no_grad()
    def load(self, state: Mapping[str, Checkpoint], step: int) -> None:
        """Take over what `state` returned after `step` steps; the model's parameters follow the main weights.

        Raises BadInputError if names or shapes are not this model's.
        """
        for tensors in state.values():
            check_names_and_shapes(self.main, tensors)
        load_tensors(self.main, state["param"])
        for key in STATE[1:]:
            views = self._views(key)
            load_tensors(views, {name: state[key][name] for name in views})
        self._step.fill_(step)
        self._round()

    def _views(self, buffer: str) -> dict[str, Tensor]:
        """One of the groups' buffers by parameter name."""
        return {name: view for group in self._groups for name, view in group.views(getattr(group, buffer)).items()}

    def _round(self) -> None:
        for group in self._groups:
            group.round_weights()
        for name, parameter in self._untrained.items():
            parameter.copy_(self.main[name])


def _backends(device: torch.device, backend: Backend | None, moments: str) -> tuple[Backend, Backend]:
    """The kernels of the norm and of Adam.

    Without a GPU torch's fused Adam: it takes less than half the definition's time, but keeps no bf16 moments.
    """
    fused: Backend = "torch" if moments == "fp32" else "reference"
    if device.type != "cuda":
        return "reference", fused
    name = choose_backend("auto", device).name if backend is None else backend
    if name == "torch":
        return "reference", fused
    return ("reference", "reference") if name == "reference" else ("triton", "triton")
