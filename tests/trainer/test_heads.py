"""Models whose logits are divided or capped: the loss of training is that of transformers, or training is refused."""

from __future__ import annotations

import pytest
import torch

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.trainer.computed import TRAINED, refuse_beyond
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import check_values, empty_decoder, load_weights
from ckptbridge.trainer.step import evaluate
from tests.conftest import TinyFolders
from tests.tiny import reference_logits, token_ids


def decoder_of(name: str, tiny_folder: TinyFolders) -> Decoder:
    source = open_model(tiny_folder(name))
    decoder = empty_decoder(source.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(source.tensors, source.config))
    return decoder


def test_the_loss_is_that_of_divided_logits(tiny_folder: TinyFolders) -> None:
    logits = reference_logits(tiny_folder("granite"), token_ids())[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, token_ids()[:, 1:].flatten())
    decoder = decoder_of("granite", tiny_folder)
    assert decoder.config.logits_divisor != 1
    assert evaluate(decoder, [token_ids()]) == pytest.approx(expected.item(), abs=1e-5)


def test_capped_logits_are_not_trained(tiny_folder: TinyFolders) -> None:
    with pytest.raises(NotSupportedError, match=r"training does not compute final_logit_softcapping = 2\.0"):
        refuse_beyond(open_model(tiny_folder("gemma2")).config, TRAINED, "training")


def test_norms_around_zero_may_be_zero(tiny_folder: TinyFolders) -> None:
    decoder = decoder_of("gemma", tiny_folder)
    with torch.no_grad():
        decoder.get_parameter("decoder.final_layernorm.weight").zero_()
    check_values(decoder)
