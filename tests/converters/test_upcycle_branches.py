"""Branch-train-mix: several dense models become one mixture, judged by transformers' own classes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute, partial_folder, plan_fingerprint
from ckptbridge.converters.model import open_model
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.tensors import InMemory
from ckptbridge.converters.upcycling.blended import blended
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.measured import LayerMeasurement
from ckptbridge.converters.upcycling.semantics import check
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.converters.test_upcycle import DENSE, TOLERANCE, weights, written
from tests.converters.test_upcycle_copies import deviation
from tests.tiny import reference_logits, save_tiny, token_ids


def spec(**values: Any) -> UpcycleSpec:
    return UpcycleSpec(**{"num_experts": 3, "topk": 2, "method": "branch-train-mix", **values})


def trained(folder: Path, target: Path, seed: int, dtype: torch.dtype | None = None, **fields: Any) -> Path:
    """A copy of a folder whose weights moved a little, as if it had been trained on; `fields` of its config change."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(seed)
    for file in sorted(target.glob("*.safetensors")):
        held = load_file(file)
        for name, tensor in held.items():
            moved = tensor.float() + 0.03 * torch.randn(tensor.shape, generator=generator)
            held[name] = moved.to(dtype or tensor.dtype)
        save_file(held, file, {"format": "pt"})
    config = target / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return target


@pytest.mark.parametrize("values", [{}, {"num_experts": 6, "topk": 4, "granularity": 2}], ids=["G1", "G2"])
@pytest.mark.parametrize("name", DENSE)
def test_models_that_are_alike_become_what_they_are(
    name: str, values: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    models = [open_model(tiny_folder(name)) for _ in range(3)]
    mixed = upcycled(models[0], spec(**values), others=models[1:])
    assert deviation(written(mixed, tmp_path / "moe"), tiny_folder(name)) <= TOLERANCE
    held = {key: tensor for key, tensor in models[0].tensors.items() if key in mixed.tensors}
    assert all(torch.equal(mixed.tensors[key].read(), tensor.read()) for key, tensor in held.items())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_one_that_differs_is_seen(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model, other = open_model(tiny_folder(name)), open_model(trained(tiny_folder(name), tmp_path / "other", 1))
    mixed = upcycled(model, spec(), others=[model, other])
    assert deviation(written(mixed, tmp_path / "moe"), tiny_folder(name)) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_experts_are_the_models_own_and_the_rest_is_their_mean(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first = save_tiny(name, tmp_path / "0", dtype)
    folders = [first, *(trained(first, tmp_path / str(seed), seed) for seed in (1, 2))]
    models = [open_model(folder) for folder in folders]
    mixed = upcycled(models[0], spec(layers="1:" if name == "qwen2" else "all"), others=models[1:])
    moe, held = weights(written(mixed, tmp_path / "moe")), [weights(folder) for folder in folders]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    seen = 0
    for key in held[0]:
        if key in moe:
            mean = (torch.stack([own[key].to(wide) for own in held]).sum(0) / 3).to(dtype)
            assert torch.equal(moe[key], mean), key
            seen += 1
    assert seen == {"llama": len(held[0]) - 4 * 3, "qwen2": len(held[0]) - 3 * 3}[name]
    block, names = ("block_sparse_moe", ("w1", "w3", "w2"))
    if name == "qwen2":
        block, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    for part, old in zip(names, ("gate_proj", "up_proj", "down_proj"), strict=True):
        for expert, own in enumerate(held):
            key = f"model.layers.2.{block}.experts.{expert}.{part}.weight"
            assert torch.equal(moe[key], own[f"model.layers.2.mlp.{old}.weight"])


def test_a_model_is_a_group_of_shards(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folders = [tiny_folder("llama"), trained(tiny_folder("llama"), tmp_path / "1", 1)]
    models = [open_model(folder) for folder in folders]
    mixed = upcycled(models[0], spec(num_experts=4, topk=2, granularity=2, scaling="down"), others=models[1:])
    for number in range(4):
        model, shard = divmod(number, 2)
        whole = models[model].tensors["decoder.layers.1.mlp.linear_fc2.weight"].read()
        made = mixed.tensors[f"decoder.layers.1.mlp.experts.experts.{number}.linear_fc2.weight"].read()
        assert torch.equal(made, 2 * whole.chunk(2, dim=1)[shard])
    with pytest.raises(BadInputError, match="topk 3"):
        upcycled(models[0], spec(num_experts=4, topk=3, granularity=2), others=models[1:])


def test_a_router_by_prompts_has_a_row_for_each_model(tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder("llama"))
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    measured = {layer: LayerMeasurement(router_rows=rows) for layer in range(4)}
    made = spec(num_experts=4, topk=2, granularity=2, router_init="hidden-state")
    mixed = upcycled(model, made, measured, others=[model])
    assert torch.equal(mixed.tensors["decoder.layers.3.mlp.router.weight"].read(), rows[[0, 0, 1, 1]])
    with pytest.raises(BadInputError, match="router_init"):
        upcycled(model, made, others=[model])


def test_a_mix_written_for_megatron_comes_back(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folders = [tiny_folder("qwen3"), trained(tiny_folder("qwen3"), tmp_path / "1", 1)]
    there = [
        written(open_model(folder), tmp_path / f"m{i}", form)
        for (i, folder), form in zip(enumerate(folders), ("torch_dist", "torch"), strict=True)
    ]
    made = spec(num_experts=2)
    mixed = upcycled(open_model(folders[0]), made, others=[open_model(folders[1])])
    direct = written(mixed, tmp_path / "direct")
    back = written(open_model(written(mixed, tmp_path / "mcore", "torch_dist")), tmp_path / "back")
    from_mcore = upcycled(open_model(there[0]), made, others=[open_model(there[1])])
    for folder in (back, written(from_mcore, tmp_path / "from mcore")):
        mine, theirs = weights(direct), weights(folder)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (back / "config.json").read_bytes() == (direct / "config.json").read_bytes()
    assert reference_logits(back, token_ids()).isfinite().all()


def test_the_receipt_knows_every_source(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folders = [tiny_folder("llama"), trained(tiny_folder("llama"), tmp_path / "1", 1)]
    models = [open_model(folder) for folder in folders]
    mixed = upcycled(models[0], spec(num_experts=2), others=models[1:])
    receipt = read_receipt(written(mixed, tmp_path / "moe"))
    for number, model in enumerate(models):
        alone = read_receipt(written(model, tmp_path / f"alone {number}"))
        assert all(receipt.source_tensors[f"{number}/{name}"] == d for name, d in alone.source_tensors.items())
    assert len(receipt.source_tensors) == sum(len(model.sources) for model in models)
    assert receipt.source_nbytes == 2 * sum(tensor.nbytes for tensor in models[0].sources.values())
    for folder in folders:
        assert any(str(folder) in note for note in receipt.notes)


def test_another_source_is_another_conversion(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folders = [tiny_folder("llama"), trained(tiny_folder("llama"), tmp_path / "1", 1)]
    models = [open_model(folder) for folder in folders]

    def print_of(*order: int) -> str:
        first, *others = (models[number] for number in order)
        mixed = upcycled(first, spec(num_experts=len(order)), others=others)
        return plan_fingerprint(plan_conversion(mixed, tmp_path / "moe", "hf", ConvertOptions(workers=1)))

    before = print_of(0, 1)
    assert before == print_of(0, 1)
    assert before != print_of(1, 0)
    config = folders[1] / "config.json"
    config.write_text(config.read_text() + " ")
    assert before != print_of(0, 1)
    mixed = upcycled(models[0], spec(num_experts=2), others=models[1:])
    with pytest.raises(BadInputError, match="source itself"):
        execute(plan_conversion(mixed, folders[1], "hf", ConvertOptions(workers=1, overwrite=True)))
    assert not partial_folder(folders[1]).exists()


def test_nothing_is_read_before_the_mix_is_written(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("llama"))
    mixed = upcycled(model, spec(), others=[model, model])
    plan = plan_conversion(mixed, tmp_path / "moe", "torch_dist", ConvertOptions(dtype=torch.bfloat16, max_ram=1 << 24))
    assert plan.peak_ram <= 1 << 24
    assert not (tmp_path / "moe").exists()


def test_a_mean_is_rounded_once_and_the_same_in_pieces() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(9, 4, generator=generator).bfloat16() for _ in range(3)]
    mean = blended([InMemory(part) for part in parts])
    exact = torch.stack(parts).double().mean(0)
    assert torch.equal(mean.read(), exact.bfloat16())
    assert torch.equal(mean.cast(torch.float32).read(), exact.float())
    assert torch.equal(torch.cat([mean.read_rows(0, 4), mean.read_rows(4, 9)]), mean.read())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        part = torch.randn(50, 40, generator=generator).to(dtype)
        for count in (2, 3, 5, 7):
            assert torch.equal(blended([InMemory(part)] * count).read(), part)
    with pytest.raises(BadInputError, match="dtypes differ"):
        blended([InMemory(parts[0]), InMemory(parts[1].float())])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ("rotary_base", "500000.0", "10000.0")),
        ({"rms_norm_eps": 1e-6}, ("layernorm_epsilon", "1e-06", "1e-05")),
        ({"max_position_embeddings": 256}, ("max_position_embeddings", "256", "128")),
    ],
    ids=str,
)
def test_models_that_are_not_alike_are_refused(
    fields: dict[str, Any], words: tuple[str, ...], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    folder = trained(tiny_folder("llama"), tmp_path / "other", 1, **fields)
    with pytest.raises(BadInputError) as refused:
        upcycled(open_model(tiny_folder("llama")), spec(num_experts=2), others=[open_model(folder)])
    for word in (*words, str(folder), str(tiny_folder("llama"))):
        assert word in str(refused.value)


def test_other_kinds_of_models_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    llama, tied = open_model(tiny_folder("llama")), open_model(tiny_folder("llama_tied"))
    with pytest.raises(BadInputError, match="share_embeddings_and_output_weights"):
        upcycled(llama, spec(num_experts=2), others=[tied])
    halves = open_model(trained(tiny_folder("llama"), tmp_path / "halves", 1, torch.bfloat16))
    with pytest.raises(BadInputError, match="dtype of"):
        upcycled(llama, spec(num_experts=2), others=[halves])
    with pytest.raises(BadInputError, match="experts already"):
        upcycled(open_model(tiny_folder("mixtral")), spec(num_experts=2), others=[llama])
    for name in ("mistral", "mixtral"):
        with pytest.raises(BadInputError, match=r"the architecture is .*, but LlamaForCausalLM"):
            upcycled(llama, spec(num_experts=2), others=[open_model(tiny_folder(name))])


@pytest.mark.parametrize(
    ("values", "others", "words"),
    [
        ({"num_experts": 4}, 1, ("num_experts is 4", "2 models", "--num-experts 2")),
        ({"num_experts": 4, "granularity": 2}, 2, ("3 models", "--num-experts 6")),
        ({"num_experts": 2}, 0, ("two models or more",)),
        ({"num_experts": 2, "method": "copy"}, 1, ("method copy takes one model",)),
    ],
    ids=str,
)
def test_every_model_is_an_expert(
    values: dict[str, Any], others: int, words: tuple[str, ...], tiny_folder: TinyFolders
) -> None:
    model = open_model(tiny_folder("llama"))
    with pytest.raises(BadInputError) as refused:
        upcycled(model, spec(**values), others=[model] * others)
    for word in words:
        assert word in str(refused.value)


def test_tokenizers_that_differ_are_told_of(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    for number in (0, 1):
        shutil.copytree(tiny_folder("llama"), tmp_path / str(number))
        (tmp_path / str(number) / "tokenizer.json").write_text(f'{{"version": "{number}"}}')
    models = [open_model(tmp_path / str(number)) for number in (0, 1)]
    assert any(
        "tokenizer.json differs" in note for note in upcycled(models[0], spec(num_experts=2), others=models[1:]).notes
    )
    alike = replace(models[1], assets=models[0].assets)
    assert not any("differs" in note for note in upcycled(models[0], spec(num_experts=2), others=[alike]).notes)


def test_a_mix_is_called_inexact(tiny_folder: TinyFolders) -> None:
    assert "averaged" in check(spec().resolved(), open_model(tiny_folder("llama")).config).inexact[0]
