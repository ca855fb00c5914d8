"""What a rank of a layout reads of an upcycled model: its own part, bit for bit, and no bytes beside it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.mcore.keys import expert_of, layer_of
from ckptbridge.converters.model import Model, open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.rank_share import rank_tensors
from ckptbridge.converters.reading import watched
from ckptbridge.converters.safetensors_header import read_header
from ckptbridge.converters.tensors import LazyTensor, Stored
from ckptbridge.converters.upcycling.construction import upcycled
from ckptbridge.converters.upcycling.spec import UpcycleSpec
from tests.conftest import TinyFolders

LAYERS, HIDDEN, FFN, VOCABULARY, HEAD = 4, 64, 96, 250, 8
"""Of the tiny models; qwen3's heads are 16 wide, its 8 query heads share 4 groups."""
LAYOUTS = {
    "ep4": ParallelLayout(ep=4),
    "tp2": ParallelLayout(tp=2),
    "tp2ep2etp1": ParallelLayout(tp=2, ep=2, etp=1),
    "tp2ep2": ParallelLayout(tp=2, ep=2),
    "etp2": ParallelLayout(etp=2),
    "pp2ep2": ParallelLayout(pp=2, ep=2),
    "tp2pp4ep2etp1": ParallelLayout(tp=2, pp=4, ep=2, etp=1),
    "pp2vpp2ep4": ParallelLayout(pp=2, vpp=2, ep=4),
}
SPECS = {
    "copies": UpcycleSpec(num_experts=4, topk=2),
    "virtual groups": UpcycleSpec(num_experts=8, topk=4, granularity=4),
    "shared expert": UpcycleSpec(num_experts=4, topk=2, granularity=2, shared="partition", to="qwen2_moe"),
    "two layers": UpcycleSpec(num_experts=4, topk=2, layers="1,2", to="qwen2_moe"),
}


def part_of(name: str, whole: Tensor, model: Model, layout: ParallelLayout, rank: int) -> Tensor | None:
    """What Megatron's modules hold of a whole tensor, said anew; None if it is on another rank."""
    layer, expert = layer_of(name), expert_of(name)
    per_stage = layout.world_size // layout.pp
    stage, place = rank // per_stage, rank % per_stage
    if layer is not None:
        chunk = LAYERS // (layout.pp * layout.vpp)
        home = layer // chunk % layout.pp
    else:
        home = 0 if name.startswith("embedding") else layout.pp - 1
    if stage != home:
        return None
    size = layout.tp
    if expert is not None:
        size = layout.expert_tp
        if expert // ((model.config.num_moe_experts or 0) // layout.ep) != place // size % layout.ep:
            return None
    own = place % size
    if "word_embeddings" in name or "output_layer" in name:
        padded = torch.zeros(-(-len(whole) // (128 * size)) * 128 * size, whole.shape[1])
        padded[: len(whole)] = whole
        return padded.chunk(size)[own]
    if name.endswith("linear_qkv.weight"):
        return whole.chunk(size)[own]  # query groups follow each other
    if "linear_fc1.weight" in name:
        gate_proj, up_proj = whole.chunk(2)
        return torch.cat([gate_proj.chunk(size)[own], up_proj.chunk(size)[own]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(size, 1)[own]
    return whole


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_together_hold_the_offline_result(
    name: str, kind: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    layout, online = LAYOUTS[name], upcycled(open_model(tiny_folder("llama")), SPECS[kind])
    execute(plan_conversion(online, tmp_path / "mcore", "torch_dist", ConvertOptions(workers=1)))
    offline = {name: tensor.read() for name, tensor in open_model(tmp_path / "mcore").tensors.items()}
    seen: set[str] = set()
    for rank in range(layout.world_size):
        held = {name: tensor.read() for name, tensor in rank_tensors(online, layout, rank).items()}
        expected = {name: part_of(name, whole, online, layout, rank) for name, whole in offline.items()}
        assert held.keys() == {name for name, part in expected.items() if part is not None}
        assert [name for name, part in held.items() if not torch.equal(part, expected[name])] == []
        seen |= held.keys()
    assert seen == offline.keys()


# ---- bytes ----------------------------------------------------------------------------------------------------------


def bytes_read(tensors: dict[str, LazyTensor], folder: Path) -> dict[str, int]:
    """How many different bytes of each stored tensor are read with these."""
    read: dict[Path, set[range]] = defaultdict(set)
    with watched(lambda path, offset, view: read[path].add(range(offset, offset + len(view)))):
        for tensor in tensors.values():
            tensor.read()
    counts: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        touched = torch.zeros(path.stat().st_size, dtype=torch.bool)
        for run in read[path]:
            touched[run.start : run.stop] = True
        for name, stored in read_header(path).items():
            counts[name] = int(touched[stored.offset : stored.offset + stored.nbytes].sum())
    return {name: count for name, count in counts.items() if count}


def bytes_needed(spec: UpcycleSpec, layout: ParallelLayout, rank: int) -> dict[str, int]:
    """What a rank needs of the dense model, in bytes: a bound from the layout's definition alone."""
    per_stage = layout.world_size // layout.pp
    stage, place = rank // per_stage, rank % per_stage
    own, own_expert = place % layout.tp, place % layout.expert_tp
    wide = HIDDEN * 4
    vocabulary = 256 // layout.tp
    rows = min(VOCABULARY, (own + 1) * vocabulary) - own * vocabulary
    needed: dict[str, int] = {}
    if stage == 0:
        needed["model.embed_tokens.weight"] = rows * wide
    if stage == layout.pp - 1:
        needed |= {"lm_head.weight": rows * wide, "model.norm.weight": wide}
    shared = FFN // 2 if spec.shared == "partition" else 0
    width = (FFN - shared) // spec.granularity
    experts = spec.num_experts // layout.ep
    first = place // layout.expert_tp % layout.ep * experts
    part = width // layout.expert_tp
    neurons = set[int]()
    for expert in range(first, first + experts):
        at = shared + expert % spec.granularity * width + own_expert * part
        neurons |= set(range(at, at + part))
    neurons |= set(range(own * shared // layout.tp, (own + 1) * shared // layout.tp))
    if spec.to == "qwen2_moe" and not shared:  # its shared expert has rows of gate_proj and up_proj, and a zero down
        unused = set(range(own * width // layout.tp, (own + 1) * width // layout.tp))
    else:
        unused = set[int]()
    for layer in range(LAYERS):
        if layer // (LAYERS // (layout.pp * layout.vpp)) % layout.pp != stage:
            continue
        stem = f"model.layers.{layer}."
        is_mixture = spec.layers == "all" or str(layer) in spec.layers.split(",")
        wanted = neurons if is_mixture else set(range(FFN // layout.tp))
        above = len(wanted | unused if is_mixture else wanted)
        needed |= {f"{stem}mlp.{name}_proj.weight": above * wide for name in ("gate", "up")}
        needed[f"{stem}mlp.down_proj.weight"] = len(wanted) * wide
        needed |= {f"{stem}{name}_layernorm.weight": wide for name in ("input", "post_attention")}
        for name, heads in (("q", 8), ("k", 4), ("v", 4), ("o", 8)):
            needed[f"{stem}self_attn.{name}_proj.weight"] = heads * HEAD * wide // layout.tp
    return needed


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_reads_its_own_bytes_and_no_others(name: str, kind: str, tiny_folder: TinyFolders) -> None:
    layout, folder, spec = LAYOUTS[name], tiny_folder("llama"), SPECS[kind]
    online = upcycled(open_model(folder), spec)
    for rank in range(layout.world_size):
        assert bytes_read(rank_tensors(online, layout, rank), folder) == bytes_needed(spec, layout, rank)


def test_the_count_sees_columns_that_are_read_for_nothing(
    tiny_folder: TinyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, folder, spec = LAYOUTS["ep4"], tiny_folder("llama"), SPECS["virtual groups"]
    monkeypatch.setattr(Stored, "read_block", LazyTensor.read_block)
    read = bytes_read(rank_tensors(upcycled(open_model(folder), spec), layout, 0), folder)
    needed = bytes_needed(spec, layout, 0)
    assert {name for name in read if read[name] != needed[name]} == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(LAYERS)
    }


def test_the_last_stage_holds_tied_embeddings_too(tiny_folder: TinyFolders) -> None:
    online = upcycled(open_model(tiny_folder("llama_tied")), SPECS["copies"])
    first, last = (rank_tensors(online, ParallelLayout(pp=2), rank) for rank in (0, 1))
    assert "output_layer.weight" not in first
    assert torch.equal(first["embedding.word_embeddings.weight"].read(), last["output_layer.weight"].read())
    assert "output_layer.weight" not in rank_tensors(online, ParallelLayout(), 0)


@pytest.mark.parametrize(
    ("layout", "rank", "words"),
    [
        (ParallelLayout(ep=3), 0, "ep = 3 does not divide num_moe_experts = 4"),
        (ParallelLayout(ep=4), 4, "rank 4: the layout has ranks 0 to 3"),
        (ParallelLayout(), -1, "rank -1"),
    ],
)
def test_layouts_and_ranks_that_there_are_not_are_refused(
    layout: ParallelLayout, rank: int, words: str, tiny_folder: TinyFolders
) -> None:
    with pytest.raises(BadInputError, match=words):
        rank_tensors(upcycled(open_model(tiny_folder("llama")), SPECS["copies"]), layout, rank)
