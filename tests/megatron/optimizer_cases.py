"""Runs whose optimizers are resharded, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.converters.reshard import OptimizerFormat
from tests.megatron.launch import Layout

BUCKET = 9000
"""Elements: several buckets on a rank, and padding between them, for q and k norms are 16 wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A run that is saved. In fp32 the weights are the main weights."""

    model: str
    layout: Layout
    distributed: bool
    dtype: str = "bfloat16"
    bucket_size: int | None = None


SOURCES: dict[str, Source] = {
    "dense": Source(model="llama", layout=Layout(tp=2), distributed=True),
    "dense plain": Source(model="llama", layout=Layout(tp=2, pp=2), distributed=False),
    "dense fp32": Source(model="qwen3", layout=Layout(tp=2), distributed=True, dtype="float32"),
    "dense fp32 plain": Source(model="qwen2_tied", layout=Layout(pp=2), distributed=False, dtype="float32"),
    "tied": Source(model="llama_tied", layout=Layout(pp=2), distributed=True, bucket_size=20000),
    "moe": Source(model="qwen2_moe", layout=Layout(tp=2, ep=2, etp=2), distributed=True),
    "moe plain": Source(model="qwen3_moe_dense_first", layout=Layout(ep=2), distributed=False),
    "moe buckets": Source(model="qwen3_moe", layout=Layout(tp=2, ep=2), distributed=True, bucket_size=BUCKET),
    "moe fp32": Source(model="qwen3_moe", layout=Layout(ep=2), distributed=True, dtype="float32"),
    # A router's expert_bias is a buffer: no optimizer holds a state of it.
    "bias": Source(model="glm4_moe_air", layout=Layout(tp=2, ep=2), distributed=True),
    "bias plain": Source(model="glm4_moe_air", layout=Layout(ep=2), distributed=False),
    "bias fp32": Source(model="glm4_moe_air", layout=Layout(ep=2), distributed=True, dtype="float32"),
    # Experts have biases, which are not decayed. megatron-core 0.19.2 trains those under expert parallelism only: it
    # cuts none, and adds their biases in place where nothing is dealt, which autograd forbids (transformer/mlp.py).
    "expert biases": Source(model="gpt_oss", layout=Layout(ep=2), distributed=True),
    "expert biases plain": Source(model="gpt_oss", layout=Layout(tp=2, ep=2), distributed=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reshard:
    """A checkpoint of a source, and what is made of it."""

    source: str
    read: str
    written: str
    layout: Layout
    via: Layout | None = None
    """A layout that it is given first, in the same format."""
    optimizer: OptimizerFormat = "keep"
    distributed: bool | None = None
    """The optimizer that loads it; None: the source's kind."""
    bucket_size: int | None = None
    per_layer_keys: bool = False
    vpp: int = 1

    def __str__(self) -> str:
        return f"{self.source}: {self.read} to {self.written} {self.layout}, {self.optimizer}".replace(
            ", keep", " in chunks" * (self.vpp > 1)
        )


RESHARDS = (
    Reshard(source="dense", read="torch_dist", written="torch_dist", layout=Layout(pp=2)),
    Reshard(source="dense", read="torch_dist", written="torch_dist", layout=Layout(tp=4), per_layer_keys=True),
    Reshard(source="dense", read="torch_dist", written="torch", layout=Layout(pp=2)),
    Reshard(source="dense", read="torch", written="torch_dist", layout=Layout()),
    Reshard(source="dense plain", read="torch_dist", written="torch_dist", layout=Layout(tp=2)),
    Reshard(source="dense plain", read="torch", written="torch", layout=Layout(pp=2)),
    Reshard(source="dense fp32", read="torch_dist", written="torch_dist", layout=Layout(tp=2, pp=2)),
    Reshard(source="dense fp32", read="torch", written="torch", layout=Layout()),
    Reshard(source="dense fp32", read="torch", written="torch", layout=Layout(), optimizer="plain", distributed=False),
    Reshard(source="dense fp32 plain", read="torch_dist", written="torch", layout=Layout(tp=2)),
    Reshard(
        source="dense fp32 plain",
        read="torch",
        written="torch_dist",
        layout=Layout(),
        optimizer="fully_reshardable",
        distributed=True,
    ),
    Reshard(source="tied", read="torch", written="torch", layout=Layout(tp=2, pp=2), bucket_size=20000),
    Reshard(source="tied", read="torch", written="torch_dist", layout=Layout()),
    Reshard(source="moe", read="torch_dist", written="torch_dist", layout=Layout(pp=2, ep=2)),
    Reshard(source="moe", read="torch", written="torch", layout=Layout(tp=2, pp=2)),
    Reshard(
        source="moe", read="torch_dist", written="torch", layout=Layout(ep=4), optimizer="plain", distributed=False
    ),
    Reshard(source="moe plain", read="torch", written="torch", layout=Layout(tp=2, ep=2, etp=2)),
    Reshard(
        source="moe plain",
        read="torch_dist",
        written="torch",
        layout=Layout(pp=2, ep=2),
        optimizer="distributed",
        distributed=True,
    ),
    Reshard(source="moe buckets", read="torch", written="torch", layout=Layout(tp=2, pp=2, ep=2), bucket_size=BUCKET),
    Reshard(source="moe buckets", read="torch", written="torch_dist", layout=Layout(tp=2, ep=2)),
    Reshard(source="moe fp32", read="torch_dist", written="torch", layout=Layout(ep=4)),
    Reshard(source="moe fp32", read="torch", written="torch_dist", layout=Layout(pp=2)),
    Reshard(source="bias", read="torch_dist", written="torch_dist", layout=Layout(pp=2, ep=2)),
    Reshard(source="bias", read="torch", written="torch", layout=Layout(pp=2)),
    Reshard(
        source="bias", read="torch_dist", written="torch", layout=Layout(ep=2), optimizer="plain", distributed=False
    ),
    Reshard(source="bias plain", read="torch", written="torch_dist", layout=Layout(tp=2, ep=2)),
    Reshard(source="bias fp32", read="torch_dist", written="torch", layout=Layout(pp=2, ep=2)),
    Reshard(source="bias fp32", read="torch", written="torch_dist", layout=Layout()),
    Reshard(source="expert biases", read="torch_dist", written="torch_dist", via=Layout(), layout=Layout(tp=2, ep=2)),
    Reshard(source="expert biases", read="torch", written="torch", via=Layout(), layout=Layout(ep=4)),
    Reshard(source="expert biases plain", read="torch_dist", written="torch", via=Layout(), layout=Layout(pp=2, ep=2)),
    Reshard(source="expert biases plain", read="torch", written="torch_dist", via=Layout(pp=2), layout=Layout(ep=2)),
)
IN_CHUNKS = (
    Reshard(source="dense plain", read="torch_dist", written="torch", layout=Layout(tp=2, pp=2), vpp=2),
    Reshard(source="tied", read="torch", written="torch", layout=Layout(tp=2, pp=2), bucket_size=20000, vpp=2),
    Reshard(source="moe", read="torch_dist", written="torch", layout=Layout(tp=2, pp=2, etp=2), vpp=2),
    Reshard(
        source="moe buckets", read="torch", written="torch", layout=Layout(tp=2, pp=2, etp=2), bucket_size=BUCKET, vpp=2
    ),
    Reshard(source="bias", read="torch_dist", written="torch", layout=Layout(tp=2, pp=2, etp=2), vpp=2),
)
"""Loaded into two model chunks a rank; the layouts' ETP is Megatron's default."""
