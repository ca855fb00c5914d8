"""`kernels.products`: a recipe's choice reaches every product of every mixture, or is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.kernels.grouped_backend import PRODUCTS_BACKENDS, products_obstacle
from ckptbridge.trainer.loading import empty_decoder
from ckptbridge.trainer.log import read_log
from ckptbridge.trainer.loop import train
from ckptbridge.trainer.memory_plan import plan_run
from ckptbridge.trainer.mixture import use_products
from ckptbridge.trainer.products import ProductsName, capture_obstacle, choose_products
from ckptbridge.trainer.recipe import Recipe
from ckptbridge.trainer.recipe_file import parse_recipe, with_overrides
from tests.tiny import save_tiny
from tests.trainer.text import save_tokenizer, write_documents

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32
ON_GPU = torch.cuda.is_available()
HERE = [name for name in PRODUCTS_BACKENDS if ON_GPU and products_obstacle(name, torch.device("cuda")) is None]
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=32,
    num_moe_experts=4,
    moe_ffn_hidden_size=24,
    moe_router_topk=2,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("products")
    save_tiny("qwen3_moe", place / "model")
    save_tokenizer(place / "model")
    write_documents(place / "texts")
    return place


def recipe(place: Path, run: str, *overrides: str) -> Recipe:
    values: dict[str, Any] = {
        "run_folder": str(place / run),
        "model": {"init_from": str(place / "model")},
        "data": {"text": [str(place / "texts")], "sequence_length": 16, "global_batch_size": 4},
        "schedule": {"total_steps": 4},
        "export": {"hf": False},
        "precision": "bf16",
    }
    return parse_recipe(with_overrides(values, overrides))


def losses(recipe: Recipe) -> list[float]:
    train(recipe)
    return [record["loss"] for record in read_log(recipe.run_folder / "train.jsonl") if "loss" in record]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, activation_func="gelu_tanh")], ids=["at once", "by matrix"])
def test_a_name_reaches_the_products(config: ModelConfig) -> None:
    """Products in bf16 alone refuse a mixture in fp32, which the definition takes."""
    decoder = empty_decoder(config, "reference", FP32, CPU)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens_BS = torch.arange(8)[None]
    for name in ("auto", "reference"):
        use_products(decoder, name)
        decoder(tokens_BS)
    use_products(decoder, "torch")
    with pytest.raises(ValueError, match=r"backend torch: expected torch\.bfloat16, found torch\.float32"):
        decoder(tokens_BS)


def test_a_run_with_products_by_name(place: Path) -> None:
    """On a CPU `auto` is the definition; torch's products round like it, but for the order of their sums."""
    auto, reference, torchs = (
        losses(recipe(place, name, "device=cpu", f"kernels.products={name}")) for name in ("auto", "reference", "torch")
    )
    assert reference == auto
    assert torchs == pytest.approx(auto, rel=2**-7)


@pytest.mark.parametrize("name", HERE)
def test_a_run_on_a_gpu_with_every_product_that_is_here(name: ProductsName, place: Path) -> None:
    """And where the host must know the row counts, steps are launched operation by operation, which the run says."""
    expected = losses(recipe(place, f"expected {name}", "kernels.products=reference", "kernels.graph=off"))
    result = train(recipe(place, f"on a gpu {name}", f"kernels.products={name}", "schedule.total_steps=4"))
    found = [record["loss"] for record in read_log(result.log) if "loss" in record]
    assert found == pytest.approx(expected, rel=2**-6)
    waits = capture_obstacle(name)
    assert ("replayed as one CUDA graph" if waits is None else waits) in " ".join(result.notes)


@pytest.mark.parametrize("name", [name for name in HERE if capture_obstacle(name)])
def test_no_graph_is_promised_of_products_that_wait(name: ProductsName, place: Path) -> None:
    with pytest.raises(BadInputError, match=rf"kernels.graph: on was asked for, but kernels.products {name} waits"):
        train(recipe(place, f"graph {name}", f"kernels.products={name}", "kernels.graph=on"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["kernels.products=quack"],
            r"kernels.products: .*quack cannot run on cpu: .*Available here: reference, torch",
        ),
        (["kernels.products=transformer_engine"], "kernels.products: .*transformer_engine cannot run on cpu"),
        (
            ["kernels.products=torch", "precision=fp32"],
            "kernels.products: torch computes in bf16; set precision to bf16",
        ),
        (["kernels.products=cutlass"], "kernels.products: input should be 'auto', .* found 'cutlass'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(overrides: list[str], said: str, place: Path) -> None:
    with pytest.raises(BadInputError, match=said):
        train(recipe(place, "refused", "device=cpu", "model.init_from=nowhere", *overrides))


def test_products_are_for_this_packages_mixtures() -> None:
    with pytest.raises(BadInputError, match=r"kernels.products: torch is for this package's mixtures, .* use auto"):
        choose_products("torch", CPU, BF16, "transformer_engine")
    assert choose_products("auto", CPU, FP32, "transformer_engine") == "auto"


def test_widths_that_products_do_not_take_are_refused_by_matrix() -> None:
    decoder = empty_decoder(replace(CONFIG, moe_ffn_hidden_size=20), "reference", BF16, CPU)
    found = (
        r"kernels.products: torch .* multiples of 8, and .*linear_fc2 is 16 x 20; use one of auto, reference, triton"
    )
    with pytest.raises(BadInputError, match=found):
        use_products(decoder, "torch")
    use_products(decoder, "reference")


def test_the_host_waits_for_two_of_them() -> None:
    waiting = [name for name in PRODUCTS_BACKENDS if capture_obstacle(name)]
    assert waiting == ["reference", "transformer_engine"]
    assert capture_obstacle("auto") is None


def test_the_memory_plan_knows_who_multiplies(place: Path) -> None:
    config = replace(CONFIG, hidden_size=512, moe_ffn_hidden_size=4096)
    planned = {
        name: plan_run(config, recipe(place, "planned", f"kernels.products={name}")) for name in PRODUCTS_BACKENDS
    }
    ours = planned["triton"]
    rounded = 4 * 2 * 4096 * 512 * 2  # fc1's gradient, whole in bf16
    assert planned["torch"].largest_temporary > ours.largest_temporary
    assert planned["torch"].largest_temporary <= ours.largest_temporary + rounded
    assert planned["quack"] == ours
    assert planned["transformer_engine"].total == ours.total + (128 << 20)
