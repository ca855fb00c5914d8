"""Megatron checkpoints given another layout, format or naming: weights, optimizer and all that stands beside them."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptbridge.converters.convert import plan_conversion
from ckptbridge.converters.execute import execute
from ckptbridge.converters.inert_pickles import is_faithful, saved
from ckptbridge.converters.mcore.optimizer.buffers import Flat, bucket_size, buffer_layout
from ckptbridge.converters.mcore.optimizer.state import every_tensor, open_optimizer
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.pickles import Inert
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.recheck import recheck
from ckptbridge.converters.torch_archive import read_archive
from ckptbridge.converters.training_checkpoint import load_training_checkpoint
from tests.conftest import TinyFolders
from tests.converters.running import Interrupted, interrupt_after
from tests.converters.runs import (
    ITERATION,
    OTHERS,
    assert_same,
    drawn,
    expected,
    group,
    held,
    megatron_optimizer,
    reshard,
    reshard_plan,
    save_run,
)

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    [
        ("llama_tied", ParallelLayout(tp=2, pp=2), {}),
        ("qwen2_moe", ParallelLayout(tp=2, ep=2), {}),
        ("qwen3_moe", ParallelLayout(pp=2), {"per_layer_keys": True}),
        ("qwen3_moe_dense_first", ParallelLayout(ep=4), {"max_file_size": 40_000}),
    ],
)
def test_a_run_of_the_trainer_takes_another_layout(
    name: str, layout: ParallelLayout, options: dict[str, Any], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Its optimizer has no parameter groups of Megatron's; its own items are carried, and it reads the result."""
    source = save_run(tiny_folder(name), tmp_path / "run")
    reshard(source, tmp_path / "made", "torch_dist", layout, **options)
    assert (tmp_path / "made" / TRACKER).read_text() == str(ITERATION)
    back = load_training_checkpoint(tmp_path / "made")
    assert back.iteration == ITERATION
    assert back.common == OTHERS
    assert back.model.config == source.config
    assert (tmp_path / "made" / "hf" / "config.json").exists()
    for state, tensors in back.optimizer.items():
        for key, tensor in drawn(source, state).items():
            assert torch.equal(tensors[key].read(), tensor)
    assert_same(held(back.model), expected(source))


CHAIN = (
    ("torch", ParallelLayout(tp=2, pp=2), "plain"),
    ("torch", ParallelLayout(tp=4), "distributed"),
    ("torch_dist", ParallelLayout(pp=2), "plain"),
    ("torch", ParallelLayout(pp=2, vpp=2), "distributed"),
    ("torch", ParallelLayout(), "plain"),
    ("torch_dist", ParallelLayout(tp=2), "fully_reshardable"),
)
MOE_CHAIN = (
    ("torch", ParallelLayout(ep=2, pp=2), "plain"),
    ("torch", ParallelLayout(tp=2, ep=4, etp=1), "distributed"),
    ("torch_dist", ParallelLayout(ep=2), "plain"),
    ("torch", ParallelLayout(tp=2, pp=2, ep=2, first_stage_layers=1), "distributed"),
    ("torch", ParallelLayout(tp=2), "plain"),
    ("torch_dist", ParallelLayout(pp=2, ep=2), "fully_reshardable"),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "qwen2_moe"])
@pytest.mark.parametrize("names", ["te", "local"])
def test_every_form_becomes_every_other(
    name: str, dtype: torch.dtype, names: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Around a chain of formats, layouts and kinds of optimizer: after each link, everything is there bit for bit."""
    model = save_run(tiny_folder(name), tmp_path / "run", dtype=dtype, optimizer=megatron_optimizer())
    wanted = expected(model, dtype)
    for number, (to, layout, kind) in enumerate(MOE_CHAIN if "moe" in name else CHAIN):
        target = tmp_path / str(number)
        model = reshard(model, target, to, layout, optimizer=kind, legacy_names=names)
        optimizer = open_optimizer(model)
        assert optimizer is not None
        assert optimizer.kind == kind
        assert model.iteration == ITERATION
        found = held(model)
        if dtype == torch.float32:
            found.setdefault("param", found[""])  # a plain optimizer in fp32 has no main weights
        assert_same(found, wanted)
        settings = optimizer.settings
        assert settings is not None
        assert settings.step == 7
        assert type(settings.step) is int  # a fused Adam's
        assert [g["wd_mult"] for g in settings.dense] == [1.0, 0.0]
        assert (settings.experts is not None) == (layout.ep > 1 or layout.expert_tp != layout.tp)
        for experts in settings.experts or ():
            assert experts == {k: v for k, v in group(1.0, experts=True).items() if k != "step"}
        assert recheck(model, read_receipt(target)).passed
    assert model.saved is not None
    assert model.saved.common["opt_param_scheduler"] == OTHERS["opt_param_scheduler"]


def test_a_loss_scale_goes_along(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    scaler = {"scale": torch.tensor([65536.0]), "growth_tracker": 3}
    source = save_run(
        tiny_folder("llama"),
        tmp_path / "run",
        dtype=torch.float16,
        optimizer=megatron_optimizer() | {"grad_scaler": scaler},
    )
    for to, kind in (("torch", "plain"), ("torch", "distributed"), ("torch_dist", "plain")):
        source = reshard(source, tmp_path / f"{to} {kind}", to, ParallelLayout(tp=2), optimizer=kind)
        optimizer = open_optimizer(source)
        assert optimizer is not None
        assert optimizer.settings is not None
        assert optimizer.settings.scaler == scaler


def test_buckets_that_depend_on_the_run_are_told(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    layout = ParallelLayout(tp=2)
    assert not any("bucket" in note for note in reshard_plan(source, tmp_path / "a", "torch", layout).notes)
    assert source.saved is not None
    assert source.saved.args is not None
    source.saved.args.overlap_grad_reduce = True
    assert any("--data-parallel-size" in note for note in reshard_plan(source, tmp_path / "b", "torch", layout).notes)
    source.saved.args.ddp_bucket_size = 10_000
    assert any("10000" in note for note in reshard_plan(source, tmp_path / "c", "torch", layout).notes)
    assert not any("bucket" in note for note in reshard_plan(source, tmp_path / "d", "torch_dist", layout).notes)


def test_in_fp32_the_weights_are_the_main_weights(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    made = reshard(source, tmp_path / "made", "torch_dist", ParallelLayout(), dtype=torch.float32)
    found = held(made)
    assert_same({"": found[""]}, {"": drawn(source, "param")})  # unrounded, not bf16 widened
    assert made.saved is not None
    assert made.saved.args is not None
    assert made.saved.args.bf16 is False


def test_without_optimizer_the_weights_alone_are_carried(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    plan = reshard_plan(source, tmp_path / "made", "torch_dist", ParallelLayout(tp=2), optimizer="none")
    assert any("--no-load-optim" in note for note in plan.notes)
    execute(plan)
    made = open_model(tmp_path / "made")
    assert made.iteration == ITERATION
    assert list(held(made)) == [""]
    assert made.saved is not None
    assert "optimizer" not in made.saved.common
    assert made.saved.args is not None
    assert made.saved.args.no_save_optim is True


def test_converted_weights_stay_a_release(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    execute(plan_conversion(open_model(tiny_folder("mixtral")), tmp_path / "converted", "torch_dist"))
    source = open_model(tmp_path / "converted")
    for to in ("torch_dist", "torch"):
        made = reshard(source, tmp_path / to, to, ParallelLayout(ep=2))
        assert (tmp_path / to / TRACKER).read_text() == "release"
        assert_same(held(made), held(source))


def test_arguments_follow_the_layout_and_keep_the_rest(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("qwen2_moe"), tmp_path / "run", optimizer=megatron_optimizer())
    assert source.saved is not None
    args = source.saved.args
    assert args is not None
    args.seed, args.attention_backend = 1234, Inert("megatron.core.transformer.enums.AttnBackend", (5,))
    args.lost = Inert("megatron.core.SomeObject")
    plan = reshard_plan(source, tmp_path / "made", "torch", ParallelLayout(tp=2, pp=2, ep=2))
    assert any("args.lost" in note for note in plan.notes)
    execute(plan)
    made = open_model(tmp_path / "made").saved
    assert made is not None
    assert made.args is not None
    found = vars(made.args)
    assert found["seed"] == 1234
    assert found["attention_backend"] == args.attention_backend
    assert "lost" not in found
    assert (found["tensor_model_parallel_size"], found["pipeline_model_parallel_size"]) == (2, 2)
    assert (found["expert_model_parallel_size"], found["expert_tensor_parallel_size"]) == (2, 2)
    assert found["ckpt_format"] == "torch"
    assert found["padded_vocab_size"] == 256
    assert found["use_distributed_optimizer"] is True


def test_a_killed_reshard_is_resumed_to_the_same_bytes(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("qwen3"), tmp_path / "run", optimizer=megatron_optimizer())
    layout = ParallelLayout(tp=2, pp=2)
    reshard(source, tmp_path / "whole", "torch", layout)
    plan = reshard_plan(source, tmp_path / "killed", "torch", layout)
    with pytest.raises(Interrupted):
        execute(plan, interrupt_after(plan.nbytes // 2))
    reshard(source, tmp_path / "killed", "torch", layout, resume=True)
    whole = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("*.pt")}
    assert len(whole) == 8
    for path, data in whole.items():
        assert (tmp_path / "killed" / path).read_bytes() == data


@pytest.mark.parametrize("state", ["param", "exp_avg_sq"])
@pytest.mark.parametrize(
    ("to", "kind"), [("torch_dist", "fully_reshardable"), ("torch", "plain"), ("torch", "distributed")]
)
def test_a_flipped_bit_in_the_optimizer_is_found_by_name(
    to: str, kind: str, state: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    plan = reshard_plan(source, tmp_path / "made", to, ParallelLayout(tp=2), optimizer=kind)
    execute(plan)
    file, piece = next((f, p) for f in plan.files for p in f.pieces if f".{state}" in p.name)
    with (tmp_path / "made" / file.name).open("r+b") as opened:
        opened.seek(piece.offset + 5)
        byte = opened.read(1)[0]
        opened.seek(piece.offset + 5)
        opened.write(bytes([byte ^ 4]))
    found = recheck(open_model(tmp_path / "made"), read_receipt(tmp_path / "made"))
    assert found.changed == (piece.name,)
    assert not found.missing


def test_the_receipt_names_the_sources_optimizer(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    for to in ("torch_dist", "torch"):
        made = reshard(source, tmp_path / to, to, ParallelLayout(tp=2))
        receipt = read_receipt(tmp_path / to)
        assert receipt.source_tensors.keys() == every_tensor(source).keys()
        assert sum("exp_avg." in name for name in receipt.source_tensors) == len(source.sources)
        assert receipt.target_tensors.keys() == every_tensor(made).keys()


# ---- the flat buffers -----------------------------------------------------------------------------------------------


def test_a_buffer_holds_its_parameters_from_the_last_to_the_first() -> None:
    """By hand: 100, 16 and 70 elements; 70 first, then 16 at the next multiple of 64, then 100 at the next."""
    assert buffer_layout([Flat(100), Flat(16), Flat(70)], None) == ([192, 128, 0], 292)


def test_padding_at_the_end_of_a_bucket_is_not_saved() -> None:
    """A bucket is closed at 64 elements or more: 70 alone, then 100 behind the 16 that begin the second one."""
    assert buffer_layout([Flat(100), Flat(16), Flat(70)], 64) == ([134, 70, 0], 234)
    assert buffer_layout([Flat(100), Flat(16), Flat(70)], 71) == ([144, 128, 0], 244)


def test_a_shared_embedding_has_a_bucket_of_its_own() -> None:
    """The bucket before it ends where the embedding would have begun: its padding counts, that of its own end not."""
    assert buffer_layout([Flat(128, alone=True), Flat(30)], None) == ([64, 0], 192)
    assert buffer_layout([Flat(30), Flat(128, alone=True)], None) == ([128, 0], 158)


def test_buckets_are_made_only_where_their_reduction_overlaps() -> None:
    overlapping = Namespace(overlap_grad_reduce=True, ddp_bucket_size=None, ddp_num_buckets=None)
    assert bucket_size(None, numel=10, data_parallel_size=8) is None
    assert bucket_size(Namespace(overlap_grad_reduce=False, ddp_bucket_size=5), numel=10, data_parallel_size=8) is None
    assert bucket_size(overlapping, numel=10, data_parallel_size=8) == 40_000_000
    assert bucket_size(overlapping, numel=10, data_parallel_size=64) == 64_000_000
    assert bucket_size(Namespace(overlap_grad_reduce=True, ddp_bucket_size=5), numel=9, data_parallel_size=1) == 5
    assert bucket_size(Namespace(overlap_grad_reduce=True, ddp_num_buckets=4), numel=9, data_parallel_size=1) == 2


# ---- values of classes that are not imported ------------------------------------------------------------------------


def test_an_enum_of_megatrons_is_written_as_it_was_read(tmp_path: Path) -> None:
    enum = Inert("megatron.core.transformer.enums.AttnBackend", (5,))
    value = [{"args": Namespace(backend=enum, again=[enum], dtype=torch.bfloat16, path=None), "step": 3}]
    (tmp_path / "x.pt").write_bytes(saved(value))
    back, _ = read_archive(tmp_path / "x.pt")
    assert vars(back[0]["args"]) == vars(value[0]["args"])
    (tmp_path / "y.pt").write_bytes(saved(back))
    again, _ = read_archive(tmp_path / "y.pt")
    assert vars(again[0]["args"]) == vars(value[0]["args"])
    assert b"ckptbridge" not in (tmp_path / "y.pt").read_bytes()


def test_plain_values_are_what_torch_itself_writes(tmp_path: Path) -> None:
    value = {"a": [1, (2.5, None)], "b": {"c": torch.arange(3)}, "d": "text"}
    out = io.BytesIO()
    torch.save(value, out)
    assert saved(value) == out.getvalue()


def test_an_object_without_its_attributes_is_no_faithful_value() -> None:
    assert is_faithful({"a": [Inert("megatron.core.enums.ModelType", (1,))]})
    assert not is_faithful({"a": [Inert("megatron.core.Recipe")]})
    assert not is_faithful(Namespace(x={"y": (Inert("megatron.core.Recipe"),)}))
    loop: list[Any] = []
    loop.append(loop)
    assert is_faithful(loop)
