"""Optimizers as megatron-core saved them before `fully_reshardable`: flat slices in a grid, and chained prefixes."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.torch_dist_reader import Chunk, GlobalTensor, TorchDistFolder
from ckptbridge.converters.model import Model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.converters.runs import (
    STATES,
    assert_same,
    expected,
    held,
    megatron_optimizer,
    reshard,
    reshard_plan,
    save_run,
)

CUTS = {  # (rows, columns) into which tensor parallelism of 2 cuts one entry; the two halves of fc1 are cut apart
    "word_embeddings.weight": (2, 1),
    "output_layer.weight": (2, 1),
    "linear_qkv.weight": (2, 1),
    "linear_qkv.bias": (2,),
    "linear_proj.weight": (1, 2),
    "linear_fc1.weight": (4, 1),
    "linear_fc2.weight": (1, 2),
}


def as_older(source: Model, folder: Path, *, prefix: str = "", flat: bool = True) -> Model:
    """The same run with its optimizer as flat slices, each cut into three parts of unlike size."""
    saved: Any = source.saved
    path = folder / "older.distcp"
    tensors = {key: whole for key, whole in saved.tensors.items() if not key.startswith("optimizer.")}
    with path.open("wb") as out:
        for key, whole in saved.tensors.items():
            if not key.startswith("optimizer."):
                continue
            state, name = key.removeprefix("optimizer.state.").split(".", 1)
            renamed = f"{prefix}optimizer.state.{'fp32_param' if state == 'param' else state}.{name}"
            tensors[renamed] = _older(whole, renamed, name, path, out) if flat else _renamed(whole, renamed)
    common = saved.common | {
        "content_metadata": {"distrib_optim_sharding_type": "fully_sharded_model_space"} if flat else {},
    }
    return replace(source, saved=TorchDistFolder(saved.path, tensors, saved.objects, common))


def _renamed(whole: GlobalTensor, key: str) -> GlobalTensor:
    return GlobalTensor(key, whole.shape, whole.dtype, whole.chunks)


def _older(whole: GlobalTensor, key: str, name: str, path: Path, out: Any) -> GlobalTensor:
    cuts = next((cut for end, cut in CUTS.items() if name.endswith(end)), None)
    axes = len(whole.shape) - (len(cuts) if cuts else 1)
    grid = cuts or (1,)
    if cuts is None and whole.shape[-2:] and name.endswith(("router.weight", "gate_weight")):
        axes, grid = len(whole.shape) - 2, (1, 1)
    local = [n // c for n, c in zip(whole.shape[axes:], grid, strict=True)]
    made = GlobalTensor(key, (*whole.shape[:axes], *grid, int(torch.tensor(local).prod())), whole.dtype)
    value = _read(whole)
    for index in (
        torch.cartesian_prod(*(torch.arange(n) for n in made.shape[:-1])).reshape(-1, len(made.shape) - 1).tolist()
    ):
        cell: Tensor = value[tuple(index[:axes])]
        for axis, (at, size) in enumerate(zip(index[axes:], local, strict=True)):
            cell = cell.narrow(axis, at * size, size)
        start = 0
        for part in cell.reshape(-1).split(max(1, cell.numel() // 3 + 1)):
            blob = io.BytesIO()
            torch.save(part.clone().reshape(*(1 for _ in index), -1), blob)
            sizes = (*(1 for _ in index), len(part))
            made.chunks.append(Chunk((*index, start), sizes, path, out.tell(), len(blob.getvalue())))
            out.write(blob.getvalue())
            start += len(part)
    return made


def _read(whole: GlobalTensor) -> Tensor:
    value = torch.zeros(whole.shape)
    for chunk in whole.chunks:
        place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        value[place] = whole.saved(chunk).read()
    return value


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_flat_slices_are_put_together(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder(name), tmp_path / "run", optimizer=megatron_optimizer())
    older = as_older(source, tmp_path / "run" / "iter_0000007")
    assert_same(held(older), expected(source))
    made = reshard(older, tmp_path / "made", "torch_dist", ParallelLayout(tp=2))
    assert_same(held(made), expected(source))
    assert isinstance(made.saved, TorchDistFolder)
    assert made.saved.common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    assert not any("fp32_param" in key for key in made.saved.tensors)


def test_two_slices_exchanged_show(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    older: Any = as_older(source, tmp_path / "run" / "iter_0000007")
    whole = older.saved.tensors["optimizer.state.exp_avg.decoder.layers.self_attention.linear_proj.weight"]
    swapped = [
        Chunk((o[0], o[1], 1 - o[2], o[3]), c.sizes, c.path, c.at, c.nbytes) for c in whole.chunks for o in [c.offsets]
    ]
    whole.chunks[:] = swapped
    with pytest.raises(AssertionError, match=r"exp_avg decoder\.layers\.0\.self_attention\.linear_proj"):
        assert_same(held(older), expected(source))


def test_slices_that_do_not_add_up_are_refused(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = save_run(tiny_folder("llama"), tmp_path / "run", optimizer=megatron_optimizer())
    older: Any = as_older(source, tmp_path / "run" / "iter_0000007")
    key = "optimizer.state.exp_avg.decoder.layers.self_attention.linear_proj.weight"
    older.saved.tensors[key].shape = (4, 1, 3, 2048)
    with pytest.raises(BadInputError, match="do not add up"):
        reshard_plan(older, tmp_path / "made", "torch_dist", ParallelLayout())


def test_prefixes_of_chained_optimizers_are_read(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """The plain optimizer's form: whole tensors, fp32_param, no word of a sharding type."""
    plain = {"optimizer": megatron_optimizer()["optimizer"]}
    source = save_run(tiny_folder("qwen2_moe"), tmp_path / "run", optimizer=plain)
    older = as_older(source, tmp_path / "run" / "iter_0000007", prefix="chained_0.", flat=False)
    assert older.saved is not None
    assert older.saved.states() == STATES
    made = reshard(older, tmp_path / "made", "torch", ParallelLayout(ep=2), optimizer="plain")
    assert_same(held(made), expected(source))
