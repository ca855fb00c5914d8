"""One forward pass over a checkpoint of either side, watched stage by stage.

A Hugging Face folder is run by transformers' own class with plain attention, a Megatron-Core folder by this
package's decoder with the reference kernels: two programs that share no code, so that a mistake in the
converters cannot cancel out.

Shapes: T tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.fold import folded
from ckptbridge.converters.model import Model, decoder_tensors
from ckptbridge.trainer.loading import check_values, empty_decoder, load_weights

LOGIT_CHUNK = 128
"""Tokens whose logits are looked at together: 25 MB of fp32 at 49,152 words, 78 MB at 152,000."""

OnHidden = Callable[[str, Tensor], None]
"""Called with a stage ("embedding", "decoder.layers.3", "decoder.final_layernorm") and its fp32 output [T, H]."""
OnLogits = Callable[[int, Tensor], None]
"""Called with the number of the first token and fp32 logits [<= LOGIT_CHUNK, V]."""


@torch.no_grad()
def observe(model: Model, tokens_T: Tensor, dtype: torch.dtype, on_hidden: OnHidden, on_logits: OnLogits) -> None:
    """Run the tokens through the model in `dtype` on the CPU; the callbacks see every stage in order."""
    run = _run_transformers if model.format == "hf" else _run_decoder
    run(model, tokens_T[None], dtype, lambda stage, x: on_hidden(stage, x.detach()[0].float()), on_logits)


def _run_decoder(model: Model, tokens_BS: Tensor, dtype: torch.dtype, on_hidden: OnHidden, on_logits: OnLogits) -> None:
    decoder = empty_decoder(model.config, "reference", dtype, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    check_values(decoder)
    hidden_TH = decoder(tokens_BS, on_stage=on_hidden).hidden_BSH[0]
    for start in range(0, len(hidden_TH), LOGIT_CHUNK):
        on_logits(start, decoder.logits(hidden_TH[start : start + LOGIT_CHUNK]).float())


def _run_transformers(
    model: Model, tokens_BS: Tensor, dtype: torch.dtype, on_hidden: OnHidden, on_logits: OnLogits
) -> None:
    network = _load_transformers(model, dtype)
    body = network.model
    stages = {
        "embedding": body.embed_tokens,
        **{f"decoder.layers.{number}": layer for number, layer in enumerate(body.layers)},
        "decoder.final_layernorm": body.norm,
    }
    for name, module in stages.items():
        module.register_forward_hook(_hook(name, on_hidden))
    logits_TV = network(tokens_BS, use_cache=False).logits[0]
    for start in range(0, len(logits_TV), LOGIT_CHUNK):
        on_logits(start, logits_TV[start : start + LOGIT_CHUNK].float())


def _hook(name: str, on_hidden: OnHidden) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        on_hidden(name, output[0] if isinstance(output, tuple) else output)

    return hook


def _load_transformers(model: Model, dtype: torch.dtype) -> Any:
    """The folder's own class, with every weight found: transformers draws missing ones and says so in a log only."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            model.path,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",  # the grouped product refuses rows that are no multiple of 16 bytes
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    ignored = _further_layers(model)  # transformers' classes have no part in them
    found = {kind: [name for name in map(str, names) if not name.startswith(ignored)] for kind, names in info.items()}
    problems = [f"{kind}: {', '.join(folded(sorted(names)))}" for kind, names in found.items() if names]
    if problems:
        raise BadInputError(f"{model.path}: transformers does not find this model's weights: {'; '.join(problems)}")
    return network.eval()


def _further_layers(model: Model) -> tuple[str, ...]:
    """What the names of layers that predict further tokens begin with."""
    first = model.config.num_layers
    return tuple(f"model.layers.{layer}." for layer in range(first, first + model.config.mtp_num_layers))
