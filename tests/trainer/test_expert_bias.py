"""Balance by moving expert biases: Megatron-Core's rule, in what is trained, saved and exported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model import decoder_tensors, open_model
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.expert_bias import move_expert_biases
from ckptbridge.trainer.loading import empty_decoder
from ckptbridge.trainer.optimizer import Optimizer
from ckptbridge.trainer.recipe import OptimizerSection
from ckptbridge.trainer.update import Update
from tests.conftest import TinyFolders
from tests.tiny import token_ids

CPU = torch.device("cpu")
RATE = 0.01


def run_of(
    name: str, tiny_folder: TinyFolders, rate: float = RATE, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Optimizer, Update]:
    model = open_model(tiny_folder(name))
    decoder = empty_decoder(model.config, "reference", dtype, CPU)
    optimizer = Optimizer(decoder, OptimizerSection())
    optimizer.load_weights(decoder_tensors(model.tensors, model.config))
    update = Update(decoder, optimizer, micro_batch_size=2, aux_loss_coeff=0.0, bias_update_rate=rate, graph="off")
    return decoder, optimizer, update


def biases(decoder: Decoder) -> dict[str, Tensor]:
    return {name: held.detach() for name, held in decoder.named_parameters() if name.endswith("expert_bias")}


def moved_as_megatron_does(before: Tensor, choices_E: Tensor) -> Tensor:
    """get_updated_expert_bias of megatron-core 0.19, in plain words."""
    mean = choices_E.double().mean().item()
    return before + RATE * torch.tensor([(mean > n) - (mean < n) for n in choices_E.tolist()]).to(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_moves_each_bias_towards_the_mean(dtype: torch.dtype, tiny_folder: TinyFolders) -> None:
    decoder, optimizer, update = run_of("deepseek_v3", tiny_folder, dtype=dtype)
    before = {name: bias.clone() for name, bias in biases(decoder).items()}
    assert before
    tokens = token_ids(4)
    for _ in range(3):
        read = update.take(tokens, 1e-4)
        for layer, load in read.expert_load.items():
            name = f"decoder.layers.{layer}.mlp.router.expert_bias"
            per_step = torch.tensor(load) * tokens[:, 1:].numel() * decoder.config.moe_router_topk
            before[name] = moved_as_megatron_does(before[name], per_step.round().long())
    for name, bias in biases(decoder).items():
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias, before[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(optimizer.state()["param"][name], bias, rtol=0, atol=0)  # what a checkpoint holds


def test_without_a_rate_biases_stay(tiny_folder: TinyFolders) -> None:
    decoder, _, update = run_of("deepseek_v3", tiny_folder, rate=0.0)
    before = {name: bias.clone() for name, bias in biases(decoder).items()}
    update.take(token_ids(4), 1e-4)
    assert all(torch.equal(bias, before[name]) for name, bias in biases(decoder).items())


def test_an_expert_at_the_mean_stays_and_large_counts_do_not_overflow(tiny_folder: TinyFolders) -> None:
    decoder, _, _ = run_of("deepseek_v3", tiny_folder)
    (layer, *_) = (number for number, held in enumerate(decoder.decoder.layers) if hasattr(held.mlp, "router"))
    bias_E = decoder.decoder.layers[layer].mlp.router.expert_bias
    with torch.no_grad():
        bias_E.zero_()
    E = len(bias_E)
    choices_E = torch.full((E,), 2**31 // E + 5, dtype=torch.int32)
    choices_E[0] -= 4
    choices_E[1] += 4
    move_expert_biases(decoder, {layer: choices_E}, RATE)
    assert bias_E.tolist() == pytest.approx([RATE, -RATE] + [0.0] * (E - 2))


def test_the_busiest_expert_gets_less_as_biases_move(tiny_folder: TinyFolders) -> None:
    """With a learning rate of nothing the biases alone move."""
    *_, update = run_of("deepseek_v3", tiny_folder, rate=RATE)
    tokens = token_ids(8)

    def busiest() -> float:
        return max(max(load) for load in update.take(tokens, 1e-12).expert_load.values())

    first = busiest()
    for _ in range(40):
        last = busiest()
    assert last < 0.8 * first


def test_a_model_without_expert_biases_is_refused(tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError, match=r"moe.bias_update_rate: 0.01 was asked for, but .* no expert bias"):
        run_of("qwen3_moe", tiny_folder)
