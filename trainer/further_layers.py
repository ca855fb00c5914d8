"""The layers of a model that predict further tokens (multi-token prediction), held but not computed.

Shapes: H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.trainer.norm import Norm


class FurtherLayers(nn.Module):
    """Parameters `layers.{i}...` of every such layer.

    A checkpoint's weights are loaded into them, checked, and written again as they are. They change no logit of the
    next token, and this package trains no loss of theirs: they get no gradient, and an optimizer leaves them alone.
    `layer_of` makes the transformer layer of a number, which counts on behind the model's own layers.
    """

    def __init__(self, config: ModelConfig, backend: str, layer_of: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "enorm": Norm(config.hidden_size, config, backend),
                    "hnorm": Norm(config.hidden_size, config, backend),
                    "eh_proj": nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False),
                    "transformer_layer": layer_of(config.num_layers + number),
                    "final_layernorm": Norm(config.hidden_size, config, backend),
                }
            )
            for number in range(config.mtp_num_layers)
        )
        self.requires_grad_(False)
