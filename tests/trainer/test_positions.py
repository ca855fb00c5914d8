"""The tables of positions: kept from call to call, whoever asked first and whatever other lengths came since."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import torch

from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.trainer.attention import positions
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from tests.conftest import TinyFolders
from tests.tiny import token_ids

CPU = torch.device("cpu")


def decoder_of(name: str, tiny_folder: TinyFolders) -> Decoder:
    model = open_model(tiny_folder(name))
    decoder = empty_decoder(model.config, "reference", torch.float32, CPU)
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    return decoder


def test_a_model_trains_behind_inference_mode(tiny_folder: TinyFolders) -> None:
    decoder, tokens = decoder_of("llama", tiny_folder), token_ids(2)
    positions.cache_clear()
    with torch.inference_mode():
        seen = decoder(tokens).hidden_BSH.clone()
    hidden = decoder(tokens).hidden_BSH
    assert torch.equal(hidden, seen)
    hidden.sum().backward()


def test_tables_of_a_trained_length_outlive_other_lengths(tiny_folder: TinyFolders) -> None:
    """A captured step reads them by address."""
    decoder, tokens = decoder_of("llama", tiny_folder), token_ids(2)
    decoder(tokens)
    config, dtype = decoder.config, torch.float32
    table = weakref.ref(positions(config, tokens.shape[1], CPU, dtype).cos_SR)
    with torch.no_grad():
        for length in range(2, 14):
            decoder(tokens[:, :length])
    gc.collect()
    assert table() is not None
    del decoder
    gc.collect()
    assert table() is None


def test_norms_over_all_heads_take_a_single_group(tiny_folder: TinyFolders) -> None:
    """Keys of one group are a view of the packed rows."""
    config = open_model(tiny_folder("olmoe")).config
    config = replace(config, num_query_groups=1)
    decoder = empty_decoder(config, "reference", torch.float32, CPU)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0, 0.1)
    decoder(token_ids(2)).hidden_BSH.sum().backward()
    assert decoder.get_parameter("decoder.layers.0.self_attention.k_layernorm.weight").grad.isfinite().all()
