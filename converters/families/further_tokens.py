"""Layers that predict further tokens (multi-token prediction), as DeepSeek-V3 has them and others after it.

Hugging Face's classes ignore these layers, which published files number on behind the last one. Some files lack them
though config.json counts them: what is there decides (see `further_layers.py`).
"""

from __future__ import annotations

from dataclasses import replace

from ckptbridge.converters.families.attention import H, M
from ckptbridge.converters.fields import Pair
from ckptbridge.converters.layout import COLUMN, COPY
from ckptbridge.converters.mapping import MTP, Copy, Param

_MTP = f"{MTP}{{layer}}"


def further_layers(rows: tuple[Param, ...]) -> tuple[Param, ...]:
    """The rows of a layer that predicts a further token: those of any layer among `rows`, and its own.

    Its input is the embedding of the next token beside the hidden state, both normed, through `eh_proj`.
    """
    own = (
        Param(f"{_MTP}.enorm.weight", f"{H}.enorm.weight", COPY),
        Param(f"{_MTP}.hnorm.weight", f"{H}.hnorm.weight", COPY),
        Param(f"{_MTP}.eh_proj.weight", f"{H}.eh_proj.weight", COLUMN),
        Param(f"{_MTP}.final_layernorm.weight", f"{H}.shared_head.norm.weight", COPY),
    )
    inner = tuple(
        replace(row, mcore=f"{_MTP}.transformer_layer{row.mcore.removeprefix(M)}")
        for row in rows
        if row.mcore.startswith(M)
    )
    return own + inner


COPIES = (
    Copy(f"{H}.embed_tokens.weight", of="model.embed_tokens.weight"),
    Copy(f"{H}.shared_head.head.weight", of="lm_head.weight"),
)
"""Megatron computes these layers with the embedding and the output layer themselves."""


def further_tokens(default: int) -> Pair:
    """`num_nextn_predict_layers`: how many such layers there are."""
    return Pair("num_nextn_predict_layers", "mtp_num_layers", default=default, spellings=("num_mtp_layers",))
