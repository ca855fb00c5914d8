"""There and back, bit for bit, at every layout; and the folder in between held against loops, zipfile and torch.

A round trip finds what is lost, not what is mistaken: a table that is wrong is wrong in both directions. So the
middle is compared with `naive.py`, and the last tests plant faults that the round trip alone lets pass.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mapping import Family, packed, unpacked
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import RECEIPT_NAME, read_receipt
from ckptbridge.converters.tensors import InMemory
from tests.conftest import TinyFolders
from tests.converters import naive
from tests.tiny import NUM_LAYERS, TINY, VOCAB_SIZE, build_tiny, reference_logits, save_tiny, token_ids

DENSE = [name for name, tiny in TINY.items() if not tiny.is_moe]
MOE = [name for name, tiny in TINY.items() if tiny.is_moe]

LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "pp2": {"pp": 2},
    "pp2vpp2": {"pp": 2, "vpp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
}
MOE_LAYOUTS = LAYOUTS | {
    "ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "tp2ep4etp1": {"tp": 2, "ep": 4, "etp": 1},
    "tp2ep2etp2": {"tp": 2, "ep": 2, "etp": 2},
    "pp2ep2": {"pp": 2, "ep": 2},
}
CASES = [(name, layout) for name in DENSE for layout in LAYOUTS] + [
    (name, layout) for name in MOE for layout in MOE_LAYOUTS
]


def parallel(layout: str) -> ParallelLayout:
    return ParallelLayout(**MOE_LAYOUTS[layout])


def convert(source: Path | Model, target: Path, to: Any, **options: Any) -> Path:
    """Convert without threads or limits unless they are given; returns the target."""
    model = open_model(source) if isinstance(source, Path) else source
    execute(plan_conversion(model, target, to, ConvertOptions(**{"workers": 1, **options})))
    return target


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, read by safetensors."""
    made: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        made |= load_file(file)
    return made


def read_metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


def load_with_torch(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a torch_dist folder, read by torch's own distributed checkpoint code."""
    entries = read_metadata(folder).state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return state


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8)), name


@cache
def _naively_packed(folder: Path) -> dict[str, Tensor]:
    config = json.loads((folder / "config.json").read_text())
    return naive.megatron_tensors(weights(folder), config)


def expected_tensors(folder: Path, *, tp: int, per_layer_keys: bool) -> dict[str, Tensor]:
    """What the folder must hold by the loops of naive.py: keys, padded vocabulary, stacked layers."""
    made = dict(_naively_packed(folder))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in made:
            made[name] = naive.padded(made[name], tp)
    return made if per_layer_keys else naive.stacked(made, NUM_LAYERS)


def has_layers_in_keys(name: str) -> bool:
    """Megatron cannot stack layers that differ."""
    return name.endswith(("_sparse", "_dense_first"))


def files_of(folder: Path) -> dict[str, str]:
    """Every file below a folder with its digest, the receipt aside (it names the source)."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RECEIPT_NAME
    }


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_hf_comes_back_bit_for_bit(name: str, layout: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tiny_folder(name)
    there = convert(source, tmp_path / "mcore", "torch_dist", layout=parallel(layout))
    back = convert(there, tmp_path / "hf", "hf")
    assert_same(weights(back), weights(source))
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (back / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    tp = parallel(layout).tp
    keys = has_layers_in_keys(name)
    assert_same(load_with_torch(there / "release"), expected_tensors(source, tp=tp, per_layer_keys=keys))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_half_precision_comes_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save_tiny(name, tmp_path / "source", dtype)
    layout = "tp2ep4etp1" if TINY[name].is_moe else "tp2pp2"
    there = convert(source, tmp_path / "mcore", "torch_dist", layout=parallel(layout), per_layer_keys=True)
    back = convert(there, tmp_path / "hf", "hf")
    assert_same(weights(back), weights(source))
    assert files_of(back)["config.json"] == files_of(source)["config.json"]
    assert_same(load_with_torch(there / "release"), expected_tensors(source, tp=2, per_layer_keys=True))


@pytest.mark.parametrize("name", TINY)
def test_torch_dist_comes_back_byte_for_byte(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    layout = parallel("tp2ep2etp2" if TINY[name].is_moe else "tp2pp2")
    options = {"layout": layout, "max_file_size": 300_000}
    first = convert(tiny_folder(name), tmp_path / "first", "torch_dist", **options)
    middle = convert(first, tmp_path / "middle", "hf", max_shard_size=100_000)
    assert len(list(middle.glob("*.safetensors"))) > 3
    second = convert(middle, tmp_path / "second", "torch_dist", **options)
    assert files_of(first) == files_of(second)
    assert read_receipt(first).target_tensors == read_receipt(second).target_tensors


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe_sparse"])
def test_torch_dist_to_torch_dist_changes_the_cuts_and_nothing_else(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    first = convert(tiny_folder(name), tmp_path / "first", "torch_dist", layout=ParallelLayout(tp=4))
    second = convert(first, tmp_path / "second", "torch_dist", layout=ParallelLayout(tp=2, pp=2), per_layer_keys=True)
    third = convert(second, tmp_path / "third", "torch_dist", layout=ParallelLayout(tp=4))
    if not has_layers_in_keys(name):
        assert files_of(first) == files_of(third)
    assert_same(load_with_torch(second / "release"), expected_tensors(tiny_folder(name), tp=2, per_layer_keys=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama_tied", "qwen3_moe"])
def test_a_cast_is_torchs_cast(name: str, dtype: torch.dtype, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tiny_folder(name)
    there = convert(source, tmp_path / "mcore", "torch_dist", dtype=dtype, layout=ParallelLayout(tp=2))
    back = convert(there, tmp_path / "hf", "hf")
    direct = convert(source, tmp_path / "direct", "hf", dtype=dtype)
    expected = {key: tensor.to(dtype) for key, tensor in weights(source).items()}
    assert_same(weights(back), expected)
    assert_same(weights(direct), expected)
    for folder in (back, direct):
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == str(dtype).removeprefix("torch.")
        original = json.loads((source / "config.json").read_text())
        assert config | {"dtype": "float32"} == original


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe"])
def test_any_number_of_workers_and_any_bound_of_memory_writes_the_same_bytes(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    sizes = {"max_file_size": 250_000, "max_shard_size": 150_000}
    for to in ("torch_dist", "hf"):
        one = convert(tiny_folder(name), tmp_path / f"{to}1", to, **sizes)
        four = convert(tiny_folder(name), tmp_path / f"{to}4", to, workers=4, max_ram=1 << 20, **sizes)
        assert len(files_of(one)) >= 8
        assert files_of(one) == files_of(four)
        mine, theirs = (json.loads((folder / RECEIPT_NAME).read_text()) for folder in (one, four))
        assert mine == theirs
        assert (one / RECEIPT_NAME).read_bytes() == (four / RECEIPT_NAME).read_bytes()


@pytest.mark.parametrize(
    ("name", "layout", "per_layer_keys"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if case[1] in ("tp2pp2", "tp2ep4etp1")],
)
def test_each_rank_finds_a_chunk_for_exactly_its_own_slices(
    name: str, layout: str, per_layer_keys: bool, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Planned only: chunks are known before a byte is written."""
    source, sizes = tiny_folder(name), MOE_LAYOUTS[layout]
    target = tmp_path / "planned"
    options = ConvertOptions(layout=parallel(layout), per_layer_keys=per_layer_keys)
    plan = plan_conversion(open_model(source), target, "torch_dist", options)
    found = {
        piece.name: int(file.name.removeprefix("release/__").split("_")[0])
        for file in plan.files
        for piece in file.pieces
    }
    in_keys = per_layer_keys or has_layers_in_keys(name)
    tensors = expected_tensors(source, tp=sizes.get("tp", 1), per_layer_keys=True)
    degrees = naive.Sizes(**{"etp": sizes.get("tp", 1), **sizes})
    owners: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank in range(degrees.world):
        for key, at, size in naive.slices_of_rank(rank, tensors, NUM_LAYERS, degrees, per_layer_keys=in_keys):
            chunk = f"{key}@{','.join(map(str, at))}"
            owners.setdefault(chunk, rank)
            assert shapes.setdefault(chunk, size) == size
    assert found == owners
    metadata = pickle.loads(dict(plan.small)["release/.metadata"])  # made by this very process
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                assert shapes[f"{key}@{','.join(map(str, chunk.offsets))}"] == tuple(chunk.sizes)
    assert not target.exists()


def archives(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every archive of every .distcp file, found through the metadata."""
    for index, info in read_metadata(folder).storage_data.items():
        with (folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            yield index.fqn, file.read(info.length)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "qwen3_moe_dense_first"])
def test_every_archive_has_right_checksums_and_loads_by_itself(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    folder = convert(tiny_folder(name), tmp_path / "m", "torch_dist", layout=ParallelLayout(tp=2)) / "release"
    expected = load_with_torch(folder)
    count = 0
    for key, blob in archives(folder):
        count += 1
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            assert archive.testzip() is None, key
            assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        if key.endswith("/shard_0_1") and "common_state" in key:
            continue
        value = torch.load(io.BytesIO(blob), weights_only=True)
        if "_extra_state" in key:
            (state,) = value  # a list of one object, as mcore's loader unpacks it
            assert (state.numel(), state.dtype) == (0, torch.uint8)
        else:
            assert value.dtype == expected[key].dtype
    assert count > 50


def test_a_flipped_bit_breaks_the_checksum(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = convert(tiny_folder("llama"), tmp_path / "m", "torch_dist") / "release"
    key, blob = next((k, b) for k, b in archives(folder) if "linear_fc1" in k and "weight" in k and len(b) > 5000)
    broken = bytearray(blob)
    broken[len(blob) // 2] ^= 1
    with zipfile.ZipFile(io.BytesIO(bytes(broken))) as archive:
        assert archive.testzip() is not None, key


@pytest.mark.parametrize("name", ["llama_rope_scaled", "mistral", "mixtral", "qwen2_moe_sparse", "qwen3_moe"])
def test_the_common_state_loads_without_running_code(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    layout = ParallelLayout(tp=2, pp=2, vpp=2, ep=2 if TINY[name].is_moe else 1)
    folder = convert(tiny_folder(name), tmp_path / "m", "torch_dist", layout=layout) / "release"
    (blob,) = [blob for key, blob in archives(folder) if key == "common_state/shard_0_1"]
    with torch.serialization.safe_globals([argparse.Namespace]):
        (state,) = torch.load(io.BytesIO(blob), weights_only=True)
        legacy = torch.load(folder / "common.pt", weights_only=True)
    assert legacy == state
    assert (state["iteration"], state["checkpoint_version"]) == (0, 3.0)
    config = json.loads((tiny_folder(name) / "config.json").read_text())
    args = state["args"]
    assert args.num_layers == config["num_hidden_layers"]
    assert args.num_query_groups == config["num_key_value_heads"]
    assert args.group_query_attention is True
    assert args.vocab_size == VOCAB_SIZE
    assert args.padded_vocab_size == 256
    assert args.norm_epsilon == config["rms_norm_eps"]
    assert args.rotary_base == config["rope_parameters"]["rope_theta"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert args.virtual_pipeline_model_parallel_size == 2
    assert args.expert_model_parallel_size == layout.ep
    assert args.params_dtype == torch.float32
    assert args.window_size == ((config["sliding_window"] - 1, 0) if config.get("sliding_window") else None)
    assert args.num_experts == (config.get("num_experts") or config.get("num_local_experts"))
    assert args.moe_layer_freq == ([0, 1, 0, 1] if name == "qwen2_moe_sparse" else 1)
    for needed in ("add_position_embedding", "consumed_train_samples", "iteration", "tokenizer_type"):
        assert hasattr(args, needed)
    sparse = state["content_metadata"].get("non_homogeneous_layers")
    assert sparse is None  # nothing is forced: Megatron's own config decides by moe_layer_freq


@pytest.mark.parametrize(("version", "has"), [((0, 16), "common.pt"), ((0, 19), "common_state"), (None, "both")])
def test_the_common_state_is_written_where_a_version_looks(
    version: tuple[int, int] | None, has: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    folder = convert(tiny_folder("llama"), tmp_path / "m", "torch_dist", target_mcore=version) / "release"
    objects = set(read_metadata(folder).state_dict_metadata)
    assert (folder / "common.pt").exists() == (has != "common_state")
    assert ("common_state/shard_0_1" in objects) == (has != "common.pt")
    assert_same(weights(convert(tmp_path / "m", tmp_path / "hf", "hf")), weights(tiny_folder("llama")))


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_without_its_config_json_gets_one_that_computes_the_same(
    name: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """Megatron's own checkpoints have no hf folder: the args must be enough."""
    there = convert(tiny_folder(name), tmp_path / "mcore", "torch_dist")
    shutil.rmtree(there / "hf")
    model, original = open_model(there), open_model(tiny_folder(name))
    told, expected = model.config, original.config
    if expected.num_moe_experts and expected.layers_are_alike:  # then the dense width means nothing
        told, expected = replace(told, ffn_hidden_size=1), replace(expected, ffn_hidden_size=1)
    assert replace(told, init_method_std=0.0) == replace(expected, init_method_std=0.0)
    back = convert(there, tmp_path / "hf", "hf")
    assert_same(weights(back), weights(tiny_folder(name)))
    given = convert(open_model(there, hf_config=tiny_folder(name)), tmp_path / "given", "hf")
    assert (given / "config.json").read_bytes() == (tiny_folder(name) / "config.json").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_pattern_of_bits_survives(dtype: torch.dtype, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """Not-a-numbers with payloads, infinities, denormals: bits are moved, never values."""
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("mixtral"), source)
    generator = torch.Generator().manual_seed(2)
    for file in source.glob("*.safetensors"):
        noise = {
            name: torch.randint(0, 256, (tensor.numel() * dtype.itemsize,), generator=generator, dtype=torch.uint8)
            .view(dtype)
            .reshape(tensor.shape)
            for name, tensor in load_file(file).items()
        }
        save_file(noise, file, {"format": "pt"})
    there = convert(source, tmp_path / "mcore", "torch_dist", layout=parallel("tp2ep2etp2"))
    assert_same(weights(convert(there, tmp_path / "hf", "hf")), weights(source))


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe"])
def test_a_sharded_folder_is_loaded_by_transformers(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    folder = convert(tiny_folder(name), tmp_path / "hf", "hf", max_shard_size=80_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = weights(folder)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert index["weight_map"].keys() == held.keys()
    for key, file in index["weight_map"].items():
        assert key in load_file(folder / file)
    assert max(file.stat().st_size for file in folder.glob("*.safetensors")) < 80_000 + 4096
    assert torch.equal(reference_logits(folder, token_ids()), reference_logits(tiny_folder(name), token_ids()))


def _swapped(family: Family, fault: str) -> Family:
    """The family with a planted fault in its table."""

    def swap(names: tuple[str, ...]) -> tuple[str, ...]:
        first, second, *rest = names
        return (second, first, *rest)

    params = []
    for param in family.params:
        hit = {
            "gate and up": param.mcore.endswith("linear_fc1.weight") and "shared" not in param.mcore,
            "q and k norm": param.mcore.endswith(("q_layernorm.weight", "k_layernorm.weight")),
        }[fault]
        if hit and isinstance(param.hf, tuple):
            param = replace(param, hf=swap(param.hf))
        elif hit:
            other = param.hf.replace("q_norm", "?").replace("k_norm", "q_norm").replace("?", "k_norm")
            param = replace(param, hf=other)
        params.append(param)
    return replace(family, params=tuple(params))


@pytest.mark.parametrize(("name", "fault"), [("llama", "gate and up"), ("qwen3_moe", "q and k norm")])
def test_a_round_trip_alone_does_not_see_a_wrong_table(
    name: str, fault: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    """The table is used twice and errs twice; the loops of naive.py see it."""
    model, hf = open_model(tiny_folder(name)), weights(tiny_folder(name))
    wrong = _swapped(model.family, fault)
    middle = packed(wrong, model.config, {key: InMemory(tensor) for key, tensor in hf.items()}, name)
    back = {key: lazy.read() for key, lazy in unpacked(wrong, model.config, middle).items()}
    assert_same(back, hf)  # green, and wrong
    broken = convert(replace(model, family=wrong, tensors=middle), tmp_path / "m", "torch_dist") / "release"
    right = expected_tensors(tiny_folder(name), tp=1, per_layer_keys=False)
    with pytest.raises(AssertionError, match="linear_fc1" if fault == "gate and up" else "layernorm"):
        assert_same(load_with_torch(broken), right)


def test_the_loops_see_two_experts_that_changed_places(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    model = open_model(tiny_folder("mixtral"))
    stem = "decoder.layers.2.mlp.experts.experts"
    swapped = dict(model.tensors)
    for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
        first, second = f"{stem}.0.{matrix}", f"{stem}.3.{matrix}"
        swapped[first], swapped[second] = swapped[second], swapped[first]
    broken = convert(replace(model, tensors=swapped), tmp_path / "m", "torch_dist") / "release"
    right = expected_tensors(tiny_folder("mixtral"), tp=1, per_layer_keys=False)
    with pytest.raises(AssertionError, match="experts"):
        assert_same(load_with_torch(broken), right)


def test_mixed_precision_is_kept_or_refused_but_never_unreadable(tmp_path: Path) -> None:
    """One layer's norm in fp32, the rest in bf16: a key that stacks all layers has one dtype."""
    network = build_tiny("llama").to(torch.bfloat16)
    network.model.layers[2].input_layernorm.float()
    network.save_pretrained(tmp_path / "source")
    try:
        there = convert(tmp_path / "source", tmp_path / "m", "torch_dist")
    except BadInputError as refused:
        words = str(refused)
    else:
        assert_same(weights(convert(there, tmp_path / "hf", "hf")), weights(tmp_path / "source"))
        return
    assert "input_layernorm" in words or "layer_norm_weight" in words
    assert not (tmp_path / "m").exists()
    kept = convert(tmp_path / "source", tmp_path / "kept", "torch_dist", per_layer_keys=True)
    assert_same(weights(convert(kept, tmp_path / "hf", "hf")), weights(tmp_path / "source"))
