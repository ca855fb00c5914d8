"""A dense model becomes a mixture that computes the same: judged by transformers' own class on the written folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.tensors import InMemory, LazyTensor, join_rows, scaled
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.factors import split_scale
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders
from tests.tiny import TINY, reference_logits, save_tiny, token_ids

DENSE = [name for name, tiny in TINY.items() if not tiny.is_moe]
TOLERANCE = 1e-5
"""Of the largest |logit|, in fp32."""

SPECS: dict[str, dict[str, Any]] = {
    "copy E4T1": {"num_experts": 4, "topk": 1, "allow_inexact": True},
    "copy E4T2": {"num_experts": 4, "topk": 2},
    "E2G2T2": {"num_experts": 4, "topk": 2, "granularity": 2},
    "E2G4T8": {"num_experts": 8, "topk": 8, "granularity": 4},
    "E3G3T6": {"num_experts": 9, "topk": 6, "granularity": 3},
}


def spec(**values: Any) -> UpcycleSpec:
    return UpcycleSpec(**{"num_experts": 4, "topk": 2, "granularity": 2, "seed": 3, **values})


def written(model: Model, target: Path, to: Any = "hf", **options: Any) -> Path:
    execute(plan_conversion(model, target, to, ConvertOptions(workers=1, **options)))
    return target


@cache
def dense_logits(folder: Path) -> Tensor:
    return reference_logits(folder, token_ids())


def deviation(folder: Path, dense: Path) -> float:
    """max |difference| / max |logit| between a written mixture and its dense source, both by transformers."""
    expected = dense_logits(dense)
    return ((reference_logits(folder, token_ids()) - expected).abs().max() / expected.abs().max()).item()


def weights(folder: Path) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        made |= load_file(file)
    return made


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", DENSE)
def test_the_mixture_computes_what_the_dense_model_does(
    name: str, kind: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    moe = upcycled(open_model(tiny_folder(name)), spec(**{"granularity": 1, **SPECS[kind]}))
    folder = written(moe, tmp_path / "moe")
    assert deviation(folder, tiny_folder(name)) <= TOLERANCE
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [
        {"Llama": "MixtralForCausalLM", "Mistral": "MixtralForCausalLM", "Qwen2": "Qwen2MoeForCausalLM"}.get(
            TINY[name].hf_class, "Qwen3MoeForCausalLM"
        )
    ]
    assert config["num_experts_per_tok"] == SPECS[kind]["topk"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("name", ["llama_tied", "mistral", "qwen2", "qwen3"])
def test_a_megatron_source_gives_the_same_mixture(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    there = written(open_model(tiny_folder(name)), tmp_path / "mcore", "torch_dist")
    from_mcore = written(upcycled(open_model(there), spec()), tmp_path / "a")
    from_hf = written(upcycled(open_model(tiny_folder(name)), spec()), tmp_path / "b")
    mine, theirs = weights(from_mcore), weights(from_hf)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert deviation(from_mcore, tiny_folder(name)) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_tied", "qwen3"])
def test_a_mixture_written_for_megatron_comes_back(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    moe = upcycled(open_model(tiny_folder(name)), spec())
    direct = written(moe, tmp_path / "direct")
    there = written(moe, tmp_path / "mcore", "torch_dist")
    back = written(open_model(there), tmp_path / "back")
    mine, theirs = weights(direct), weights(back)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert (back / "config.json").read_bytes() == (direct / "config.json").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    assert type(loaded).__name__ == moe.family.architecture


def test_llama_also_becomes_qwen2_moe(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = written(upcycled(open_model(tiny_folder("llama")), spec(to="qwen2_moe")), tmp_path / "moe")
    assert json.loads((folder / "config.json").read_text())["qkv_bias"] is False
    assert deviation(folder, tiny_folder("llama")) <= TOLERANCE


def test_a_shared_expert_adds_nothing(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    held = weights(written(upcycled(open_model(tiny_folder("qwen2")), spec()), tmp_path / "moe"))
    shared = {name: tensor for name, tensor in held.items() if "shared_expert" in name}
    assert len(shared) == 4 * 4
    for name, tensor in shared.items():
        assert bool(tensor.any()) == ("gate_proj" in name or "up_proj" in name)


# ---- planted faults -------------------------------------------------------------------------------------------------

Fault = Callable[[dict[str, LazyTensor]], None]


def _fc1(gate_up: LazyTensor, gate_factor: float, up_factor: float) -> LazyTensor:
    tensor = gate_up.read()
    half = tensor.shape[0] // 2
    return InMemory(torch.cat([tensor[:half] * gate_factor, tensor[half:] * up_factor]))


def _each(tensors: dict[str, LazyTensor], matrix: str, change: Callable[[LazyTensor], LazyTensor]) -> None:
    for name in tensors:
        if ".experts.experts." in name and matrix in name:
            tensors[name] = change(tensors[name])


def _cube_root(tensors: dict[str, LazyTensor]) -> None:
    """The published scaling: the cube root of G on all three matrices."""
    root, (up, down) = 2.0 ** (1 / 3), split_scale(2.0)
    _each(tensors, "linear_fc1", lambda t: _fc1(t, root, root / up))
    _each(tensors, "linear_fc2", lambda t: scaled(t, root / down))


def _no_scale(tensors: dict[str, LazyTensor]) -> None:
    up, down = split_scale(2.0)
    _each(tensors, "linear_fc1", lambda t: _fc1(t, 1.0, 1 / up))
    _each(tensors, "linear_fc2", lambda t: scaled(t, 1 / down))


def _one_shard_twice(tensors: dict[str, LazyTensor]) -> None:
    for name in list(tensors):
        if ".experts.experts.1." in name:
            tensors[name] = tensors[name.replace("experts.1.", "experts.0.")]


def _rows_not_grouped(tensors: dict[str, LazyTensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in tensors:
        if name.endswith("router.weight"):
            tensors[name] = InMemory(torch.randn(tensors[name].shape, generator=generator) * 0.02)


def _rows_interleaved(tensors: dict[str, LazyTensor]) -> None:
    """Rows drawn once a group but laid out as if the shards of a group stood far apart."""
    for name in tensors:
        if name.endswith("router.weight"):
            rows = tensors[name]
            tensors[name] = join_rows([rows] * 4, [(0, 1), (2, 3), (1, 2), (3, 4)])


def _last_layer_only(tensors: dict[str, LazyTensor]) -> None:
    name = "decoder.layers.3.mlp.experts.experts.2.linear_fc2.weight"
    tensors[name] = scaled(tensors[name], 1.01)


FAULTS: dict[str, Fault] = {
    "Megatron's cube root": _cube_root,
    "the scale is missing": _no_scale,
    "one shard twice": _one_shard_twice,
    "router rows not grouped": _rows_not_grouped,
    "router rows interleaved": _rows_interleaved,
    "one matrix of one expert off by a percent": _last_layer_only,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_the_check_sees_planted_faults(name: str, fault: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    moe = upcycled(open_model(tiny_folder(name)), spec())
    tensors = dict(moe.tensors)
    FAULTS[fault](tensors)
    assert deviation(written(replace(moe, tensors=tensors), tmp_path / "moe"), tiny_folder(name)) > 3 * TOLERANCE


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_powers_of_two_lose_no_bit_of_bf16(name: str, granularity: int, tmp_path: Path) -> None:
    dense = save_tiny(name, tmp_path / "dense", torch.bfloat16)
    made = spec(num_experts=2 * granularity, topk=granularity, granularity=granularity, allow_inexact=granularity == 1)
    moe, held = weights(written(upcycled(open_model(dense), made), tmp_path / "moe")), weights(dense)
    up_factor, down_factor = split_scale(granularity)
    assert up_factor * down_factor == granularity
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if name == "llama" else None
    block = "block_sparse_moe" if names else "mlp"
    for layer in range(4):
        stem = f"model.layers.{layer}."
        for part, factor, dim in (("gate_proj", 1.0, 0), ("up_proj", up_factor, 0), ("down_proj", down_factor, 1)):
            for group in range(2):
                shards = [
                    moe[f"{stem}{block}.experts.{group * granularity + j}.{names[part] if names else part}.weight"]
                    for j in range(granularity)
                ]
                assert all(shard.dtype == torch.bfloat16 for shard in shards)
                whole = torch.cat([(shard.float() / factor).bfloat16() for shard in shards], dim)
                assert torch.equal(whole, held[f"{stem}mlp.{part}.weight"])
        rows = moe[f"{stem}{block}.gate.weight"]
        assert torch.equal(rows, rows[::granularity].repeat_interleave(granularity, 0))
        assert len(rows[::granularity].unique(dim=0)) == 2


def test_a_router_is_drawn_alike_in_any_order(tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    routers = [f"decoder.layers.{i}.mlp.router.weight" for i in range(4)]
    one, two = upcycled(dense, spec(seed=5)), upcycled(dense, spec(seed=5))
    forwards = {name: one.tensors[name].read() for name in routers}
    torch.manual_seed(99)
    torch.randn(7)
    backwards = {name: two.tensors[name].read() for name in reversed(routers)}
    for name in routers:
        assert torch.equal(forwards[name], backwards[name])
        assert torch.equal(two.tensors[name].read_rows(1, 3), forwards[name][1:3])
    other = upcycled(dense, spec(seed=6))
    assert not any(torch.equal(other.tensors[name].read(), forwards[name]) for name in routers)
    assert not torch.equal(forwards[routers[0]], forwards[routers[1]])
    seeds = [upcycled(dense, spec(seed=s)).tensors[name].read() for s in range(4) for name in routers]
    assert len({tensor.numpy().tobytes() for tensor in seeds}) == 16


def test_the_routers_spread_is_the_models_own_or_the_one_that_is_given(tiny_folder: TinyFolders) -> None:
    dense = open_model(tiny_folder("llama"))
    name = "decoder.layers.0.mlp.router.weight"
    many = {"num_experts": 64, "topk": 2, "granularity": 1}
    assert upcycled(dense, spec(**many)).tensors[name].read().std().item() == pytest.approx(0.02, rel=0.1)
    given = upcycled(dense, spec(**many, router_std=0.5)).tensors[name].read()
    assert given.std().item() == pytest.approx(0.5, rel=0.1)
    assert not upcycled(dense, spec(**many, router_std=0.0)).tensors[name].read().any()


def test_nothing_is_read_before_the_result_is_written(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    moe = upcycled(open_model(tiny_folder("llama")), spec())
    plan = plan_conversion(moe, tmp_path / "moe", "torch_dist", ConvertOptions(dtype=torch.bfloat16))
    assert plan.nbytes > 0
    assert not (tmp_path / "moe").exists()
    before = {name: id(tensor) for name, tensor in open_model(tiny_folder("llama")).tensors.items()}
    assert before  # the source's own view is not changed by upcycling it
    assert "decoder.layers.0.mlp.linear_fc1.weight" not in moe.tensors


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_experts": 8, "topk": 3, "granularity": 2}, ("topk 3", "granularity 2", "--topk 2 or 4")),
        ({"num_experts": 8, "topk": 1, "granularity": 2}, ("topk 1", "granularity 2")),
        ({"num_experts": 7, "topk": 2, "granularity": 2}, ("num_experts 7", "granularity 2")),
        ({"num_experts": 10, "topk": 5, "granularity": 5}, ("96", "a multiple of granularity 5")),
        ({"num_experts": 4, "topk": 6, "granularity": 2}, ("topk 6", "num_experts 4")),
        ({"num_experts": 0, "topk": 2, "granularity": 1}, ("num_experts 0",)),
        ({"num_experts": 4, "topk": 0, "granularity": 1}, ("topk 0",)),
        ({"num_experts": 4, "topk": 2, "granularity": 0}, ("granularity 0",)),
        ({"num_experts": 4, "topk": 2, "granularity": 2, "method": "copy"}, ("copy", "granularity is 2")),
        ({"to": "llama"}, ("llama",)),
        ({"to": "gpt_oss"}, ("gpt_oss", "mixtral")),
        ({"to": "qwen3_moe"}, ("qk_layernorm",)),
        ({"seed": 2**70}, ("seed",)),
        ({"router_std": -1.0}, ("router_std",)),
        ({"router_std": float("nan")}, ("router_std",)),
    ],
    ids=str,
)
def test_numbers_that_would_not_preserve_the_model_are_refused(
    values: dict[str, Any], words: tuple[str, ...], tiny_folder: TinyFolders
) -> None:
    with pytest.raises(BadInputError) as refused:
        upcycled(open_model(tiny_folder("llama")), spec(**values))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe_dense_first"])
def test_a_mixture_is_not_upcycled_again(name: str, tiny_folder: TinyFolders) -> None:
    with pytest.raises(BadInputError, match="experts already"):
        upcycled(open_model(tiny_folder(name)), spec())


def test_targets_that_cannot_say_what_the_source_computes_are_refused(tiny_folder: TinyFolders) -> None:
    for source, to, word in (
        ("qwen2", "mixtral", "add_qkv_bias"),
        ("qwen3", "mixtral", "qk_layernorm"),
        ("qwen3", "qwen2_moe", "qk_layernorm"),
        ("llama_biased", "qwen2_moe", "add_proj_bias"),
    ):
        with pytest.raises(NotSupportedError, match=word):
            upcycled(open_model(tiny_folder(source)), spec(to=to))


def test_the_notes_say_what_was_chosen(tiny_folder: TinyFolders) -> None:
    assert any("MixtralForCausalLM" in note for note in upcycled(open_model(tiny_folder("llama")), spec()).notes)
    assert any("shared expert" in note for note in upcycled(open_model(tiny_folder("qwen2")), spec()).notes)


def test_factors_are_powers_of_two_where_the_granularity_is() -> None:
    for granularity in (1, 2, 4, 8, 16, 64):
        for factor in split_scale(float(granularity)):
            assert factor == 2.0 ** round(torch.tensor(factor).log2().item())
    up, down = split_scale(3.0)
    assert (up, down) == (1.0, 3.0)
