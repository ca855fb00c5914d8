"""A model run layer by layer, against the decoder that holds it whole, and what is seen of it on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, decoder_tensors, open_model
from ckptbridge.converters.tensors import Computed, scaled
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.loading import empty_decoder, load_weights
from ckptbridge.trainer.upcycling.streaming import StreamedModel, linear_in_blocks, stream
from tests.conftest import TinyFolders
from tests.tiny import NUM_LAYERS, VOCAB_SIZE, token_ids

TOLERANCE = 3e-6
"""Of fp32 numbers of size 3: another order of summation."""
FAMILIES = (
    *("llama", "llama_tied", "llama_biased", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen2_moe_sparse"),
    *("qwen3_moe_unnormalised", "gemma2", "gemma3", "nemotron", "glm4_moe", "deepseek_v2", "deepseek_v3"),
    *("gpt_oss", "granite_moe", "olmo2", "phimoe", "phi3_long"),
)


def whole(model: Model) -> Decoder:
    decoder = empty_decoder(model.config, "reference", torch.float32, torch.device("cpu"))
    load_weights(decoder, decoder_tensors(model.tensors, model.config))
    return decoder


@torch.no_grad()
def expected_of(model: Model, sequences: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Every stage of every sequence, one sequence after the other, and the logits."""
    decoder, stages, logits = whole(model), dict[str, list[Tensor]](), []
    for ids_S in sequences:
        found = decoder(ids_S[None], on_stage=lambda stage, x: stages.setdefault(stage, []).append(x[0]))
        logits.append(decoder.logits(found.hidden_BSH[0]))
    return {stage: torch.cat(parts) for stage, parts in stages.items()}, torch.cat(logits)


def logits_of(model: Model, normed_TH: Tensor) -> Tensor:
    return torch.cat([block for _, block in StreamedModel(model).logit_blocks(normed_TH)], 1)


def sequences_of_many_lengths() -> list[Tensor]:
    return [token_ids()[0], token_ids()[1], token_ids()[0, 3:9], token_ids()[1, :17]]


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_by_layer_is_the_decoder(name: str, tiny_folder: TinyFolders) -> None:
    model, sequences = open_model(tiny_folder(name)), sequences_of_many_lengths()
    stages, logits = expected_of(model, sequences)
    found: dict[str, Tensor] = {}
    done: list[tuple[int, int]] = []
    normed = stream(model, sequences, on_hidden=found.__setitem__, on_progress=lambda *at: done.append(at))
    assert list(found) == list(stages)
    for stage, expected in stages.items():
        assert (found[stage] - expected).abs().max() <= TOLERANCE * max(1.0, expected.abs().max().item()), stage
    assert (logits_of(model, normed) - logits).abs().max() <= TOLERANCE * max(1.0, logits.abs().max().item())
    blocks = list(StreamedModel(model).logit_blocks(normed, block_bytes=100 * 64 * 4))
    assert [first for first, _ in blocks] == [0, 100, 200]
    assert (torch.cat([block for _, block in blocks], 1) - logits).abs().max() <= TOLERANCE * logits.abs().max()
    assert done == [(number + 1, NUM_LAYERS) for number in range(NUM_LAYERS)]


def test_any_format_and_a_view_that_was_never_written(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    dense = open_model(tiny_folder("llama"))
    moe = upcycled(dense, UpcycleSpec(num_experts=8, topk=4, granularity=2))
    execute(plan_conversion(moe, tmp_path / "moe", "torch_dist", ConvertOptions(workers=1)))
    sequences = sequences_of_many_lengths()
    of_view, of_folder = stream(moe, sequences), stream(open_model(tmp_path / "moe"), sequences)
    assert torch.equal(of_view, of_folder)
    assert (of_view - expected_of(dense, sequences)[0]["decoder.final_layernorm"]).abs().max() <= 1e-5


@pytest.mark.parametrize("rows", [1, 7, 30, 100])
def test_a_linear_layer_is_computed_in_blocks(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((30, 8), (30,), (5, 8)))
    reads: list[int] = []

    def read(start: int, stop: int) -> Tensor:
        reads.append(stop - start)
        return weight[start:stop].clone()

    found = linear_in_blocks(Computed((30, 8), torch.float32, read), bias, x, block_bytes=rows * 8 * 4)
    assert torch.allclose(found, torch.nn.functional.linear(x, weight, bias), atol=1e-5)
    assert max(reads) == min(rows, 30)
    assert sum(reads) == 30


def test_half_precision_is_computed_in_fp32(tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder("qwen2_moe"))
    half = replace(model, tensors={name: tensor.cast(torch.bfloat16) for name, tensor in model.tensors.items()})
    sequences = sequences_of_many_lengths()
    found = stream(half, sequences)
    assert found.dtype == torch.float32
    assert (found - expected_of(half, sequences)[0]["decoder.final_layernorm"]).abs().max() <= TOLERANCE * 10
    assert (found - stream(model, sequences)).abs().max() > 1e-3


def test_copies_of_one_expert_are_read_once(tiny_folder: TinyFolders) -> None:
    reads: list[tuple[str, int, int]] = []
    dense = open_model(tiny_folder("llama"))

    def counted(name: str) -> Computed:
        tensor = dense.tensors[name]

        def read(start: int, stop: int) -> Tensor:
            reads.append((name, start, stop))
            return tensor.read_rows(start, stop)

        return Computed(tensor.shape, tensor.dtype, read)

    source = replace(dense, tensors={name: counted(name) for name in dense.tensors})
    moe = upcycled(source, UpcycleSpec(num_experts=8, topk=2))
    assert not reads
    stream(moe, [token_ids()[0]])
    of_mlp = [name for name, _, _ in reads if ".mlp.linear_fc2." in name]
    assert sorted(of_mlp) == sorted(f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(NUM_LAYERS))
    reads.clear()
    stream(source, sequences_of_many_lengths())
    for matrix in (".mlp.linear_fc2.", ".mlp.linear_fc1.weight", ".linear_qkv.weight"):  # for all sequences together
        assert sum(matrix in name for name, _, _ in reads) == NUM_LAYERS
    reads.clear()
    stream(moe, [token_ids()[0]])
    rows_of_embedding = [stop - start for name, start, stop in reads if name.startswith("embedding")]
    assert sum(rows_of_embedding) == len(token_ids()[0].unique()) < VOCAB_SIZE


def test_one_expert_off_shows_from_its_layer_on(tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder("mixtral"))
    name = "decoder.layers.2.mlp.experts.experts.1.linear_fc2.weight"
    wrong = replace(model, tensors={**model.tensors, name: scaled(model.tensors[name], 1.01)})
    stages, found = dict[str, Tensor](), dict[str, Tensor]()
    stream(model, [token_ids()[0]], on_hidden=stages.__setitem__)
    stream(wrong, [token_ids()[0]], on_hidden=found.__setitem__)
    off = [stage for stage in stages if not torch.equal(stages[stage], found[stage])]
    assert off == ["decoder.layers.2", "decoder.layers.3", "decoder.final_layernorm"]


def test_tensors_of_another_model_are_refused(tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder("mixtral"))
    name = "decoder.layers.2.mlp.experts.experts.1.linear_fc2.weight"
    for tensors in (
        {key: tensor for key, tensor in model.tensors.items() if "layers.1.mlp.router" not in key},
        {key: tensor for key, tensor in model.tensors.items() if key != name},
    ):
        with pytest.raises(BadInputError, match=r"layers.(1.mlp.router|2.mlp.experts)"):
            stream(replace(model, tensors=tensors), [token_ids()[0]])
