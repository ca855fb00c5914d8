"""Loading refuses what is not the model's, whole and in a few lines."""

from __future__ import annotations

import pytest
import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.tensors import Checkpoint, InMemory
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import check_values, empty_decoder, load_weights
from tests.tiny import build_tiny
from tests.trainer.packing import config_of, packed


def tiny(name: str = "mixtral") -> tuple[Decoder, dict[str, InMemory]]:
    model = build_tiny(name)
    config = config_of(model.config)
    weights = {key: InMemory(tensor) for key, tensor in packed(model.state_dict(), config).items()}
    return empty_decoder(config, "reference", torch.float32, torch.device("cpu")), weights


def refused(decoder: Decoder, weights: Checkpoint) -> str:
    with pytest.raises(BadInputError) as caught:
        load_weights(decoder, weights)
    assert all(parameter.isnan().all() for parameter in decoder.parameters()), "something was copied"
    return str(caught.value)


def test_missing_unexpected_and_misshapen_names_are_listed_together_and_folded() -> None:
    decoder, weights = tiny()
    for layer in range(4):
        del weights[f"decoder.layers.{layer}.mlp.router.weight"]
        name = f"decoder.layers.{layer}.self_attention.linear_proj.weight"
        weights[name] = InMemory(torch.zeros(64, 63))
        weights[f"decoder.layers.{layer}.mlp.router.bias"] = InMemory(torch.zeros(4))
    assert refused(decoder, weights).splitlines()[1:4] == [
        "  missing: decoder.layers.{0...3}.mlp.router.weight",
        "  unexpected: decoder.layers.{0...3}.mlp.router.bias",
        "  shape of decoder.layers.{0...3}.self_attention.linear_proj.weight: "
        "the model has [64, 64], the checkpoint [64, 63]",
    ]


def test_padding_rows_of_the_vocabulary_are_left_behind() -> None:
    decoder, weights = tiny()
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padded = torch.cat([weights[name].tensor, torch.full((6, 64), 9.0)])
        weights[name] = InMemory(padded)
    load_weights(decoder, weights)
    assert torch.equal(decoder.output_layer.weight, weights["output_layer.weight"].tensor[:250])


def test_only_the_vocabulary_may_be_padded() -> None:
    decoder, weights = tiny()
    name = "decoder.layers.0.mlp.router.weight"
    weights[name] = InMemory(torch.cat([weights[name].tensor, torch.zeros(1, 64)]))
    assert "shape of decoder.layers.0.mlp.router.weight" in refused(decoder, weights)


def test_weights_are_cast_to_the_decoder() -> None:
    decoder, weights = tiny()
    load_weights(decoder.to(torch.bfloat16), weights)
    name = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    assert torch.equal(decoder.get_parameter(name), weights[name].tensor.bfloat16())


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity"), (1e5, "above 1000"), (0.0, "is zero")],
)
def test_impossible_values_are_named(value: float, said: str) -> None:
    decoder, weights = tiny()
    load_weights(decoder, weights)
    check_values(decoder)
    with torch.no_grad():
        for layer in (0, 1, 2):
            decoder.get_parameter(f"decoder.layers.{layer}.self_attention.linear_qkv.weight").fill_(value)
    with pytest.raises(BadInputError) as caught:
        check_values(decoder)
    assert "decoder.layers.{0...2}.self_attention.linear_qkv.weight" in str(caught.value)
    assert said in str(caught.value)


def test_one_nan_in_a_large_matrix_is_found() -> None:
    decoder, weights = tiny()
    load_weights(decoder, weights)
    with torch.no_grad():
        decoder.get_parameter("decoder.layers.3.mlp.experts.experts.linear_fc2.weight")[3, 63, 95] = float("nan")
    with pytest.raises(BadInputError, match=r"decoder\.layers\.3\.mlp\.experts\.experts\.linear_fc2"):
        check_values(decoder)


def test_a_shared_expert_may_start_at_zero() -> None:
    decoder, weights = tiny("qwen2_moe")
    load_weights(decoder, weights)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "shared_experts" in name:
                parameter.zero_()
    check_values(decoder)
