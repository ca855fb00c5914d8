"""What the MLPs and mixtures of a model do on a text, handed on layer by layer.

Shapes: T tokens of all sequences, H hidden_size, F dense width, N experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ckptbridge.converters.model import Model
from ckptbridge.converters.upcycling.measured import MixtureSample, MlpSample
from ckptbridge.kernels.routing import Routes
from ckptbridge.trainer.decoder import Layer, Mlp
from ckptbridge.trainer.mixture import Mixture
from ckptbridge.trainer.router import Router
from ckptbridge.trainer.upcycling.streaming import OnProgress, fed, stream


def sample_mlps(
    model: Model,
    sequences: Sequence[Tensor],
    on_sample: Callable[[MlpSample], None],
    on_progress: OnProgress | None = None,
) -> None:
    """Run sequences of token ids through a dense model (or the dense layers of any); `on_sample` sees each layer.

    One layer and one sample are in memory at a time, and the sample is T*(F + 2H) fp32 numbers.
    """

    def feed(number: int, layer: Layer, x_TH: Tensor) -> Tensor:
        if not isinstance(layer.mlp, Mlp):
            return fed(number, layer, x_TH)
        hidden: list[Tensor] = []
        hook = layer.mlp.linear_fc2.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
        out_TH = fed(number, layer, x_TH)
        hook.remove()
        on_sample(
            MlpSample(layer=number, input_TH=mlp_input(layer, x_TH), hidden_TF=torch.cat(hidden), output_TH=out_TH)
        )
        return out_TH

    stream(model, sequences, feed, on_progress=on_progress)


def sample_mixtures(
    model: Model,
    sequences: Sequence[Tensor],
    on_sample: Callable[[MixtureSample], None],
    on_progress: OnProgress | None = None,
) -> None:
    """Run sequences of token ids through a mixture; `on_sample` sees each layer that is one."""

    def feed(number: int, layer: Layer, x_TH: Tensor) -> Tensor:
        if not isinstance(layer.mlp, Mixture):
            return fed(number, layer, x_TH)
        watch = RouterWatch(layer.mlp.router)
        out_TH = fed(number, layer, x_TH)
        on_sample(watch.sample(number))
        return out_TH

    stream(model, sequences, feed, on_progress=on_progress)


def mlp_input(layer: Layer, x_TH: Tensor) -> Tensor:
    """The normed hidden states [T, H] that an MLP sees, and a router in its place."""
    return layer.mlp.linear_fc1.normed(x_TH) if isinstance(layer.mlp, Mlp) else layer.pre_mlp_layernorm(x_TH)


class RouterWatch:
    """Keeps what goes into a router and comes out of it."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.inputs: list[Tensor] = []
        self.routings: list[Routes] = []
        self._hook = router.register_forward_hook(self._seen)

    def _seen(self, module: nn.Module, inputs: tuple[Tensor], output: Routes) -> None:
        self.inputs.append(inputs[0])
        self.routings.append(output)

    def stop(self) -> None:
        """Look no longer: the router and this object know each other until then."""
        self._hook.remove()

    def rows(self, tokens: int) -> Tensor:
        """How many of the first `tokens` tokens each expert met, [N]."""
        experts_TK = torch.cat([routing.experts_TK for routing in self.routings])[:tokens]
        return torch.bincount(experts_TK.flatten(), minlength=len(self.router.weight))

    def sample(self, layer: int) -> MixtureSample:
        """All that was seen; nothing more is kept afterwards."""
        self.stop()
        input_TH = torch.cat(self.inputs)
        experts_TK = torch.cat([routing.experts_TK for routing in self.routings])
        weights_TK = torch.cat([routing.weights_TK for routing in self.routings])
        zeros_N = torch.zeros(len(self.router.weight))
        return MixtureSample(
            layer=layer,
            input_TH=input_TH,
            rows_N=self.rows(len(input_TH)),
            weights_N=zeros_N.index_add(0, experts_TK.flatten(), weights_TK.flatten()),
            logits_TN=self.router.logits(input_TH),
        )
