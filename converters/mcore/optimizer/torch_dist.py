"""The optimizer in a torch_dist checkpoint: which form it has, and what stands in `common` for each form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.mcore.optimizer.settings import (
    OptimizerKind,
    OptimizerSettings,
    chained,
    distributed_part,
    optimizer_parts,
    plain_inner,
    plain_part,
)
from ckptbridge.converters.mcore.parameters import is_optimizer_key
from ckptbridge.converters.mcore.torch_dist_reader import TorchDistFolder

SHARDING = "distrib_optim_sharding_type"
_MODEL_SPACE = ("fully_reshardable", "fully_sharded_model_space")
_BY_BUCKETS = ("dp_reshardable", "dp_zero_gather_scatter", "fully_sharded_bucket_space", "fsdp_dtensor")


def torch_dist_optimizer(folder: TorchDistFolder) -> OptimizerKind | None:
    """The form of the optimizer's state; None where there is none.

    Raises NotSupportedError for a form that follows the buffers of the run that saved it.
    """
    keys = [key for key in (*folder.tensors, *folder.objects) if is_optimizer_key(key)]
    if not keys:
        return None
    sharding = _sharding(folder)
    if sharding in _BY_BUCKETS or any("optimizer.distributed.dp_group_idx_" in key for key in keys):
        raise NotSupportedError(
            f"{folder.path}: the optimizer is saved as {sharding or 'dp_zero_gather_scatter'}: flat buffers of the run "
            "that saved it, which fit no other layout. Save the run once more with "
            "--dist-ckpt-optim-fully-reshardable, or carry the weights alone with --no-optimizer"
        )
    if sharding is not None and sharding not in _MODEL_SPACE:
        known = ", ".join(_MODEL_SPACE)
        raise NotSupportedError(
            f"{folder.path}: the optimizer is saved as {sharding!r}; supported: {known}. Carry the weights alone with "
            "--no-optimizer"
        )
    return "plain" if sharding is None else "fully_reshardable"


def _sharding(folder: TorchDistFolder) -> str | None:
    """What the checkpoint says of itself; without a word, the distributed optimizer's own name for its main weights."""
    told: Any = folder.common.get("content_metadata")
    if isinstance(told, Mapping) and SHARDING in told:
        return str(cast(Mapping[str, Any], told)[SHARDING])
    saved = folder.common.get("optimizer")
    for part in optimizer_parts(saved, str(folder.path)) if saved else ():
        if "param_state_sharding_type" in part:
            return str(part["param_state_sharding_type"])
    return "fully_reshardable" if any(key.startswith("optimizer.state.param.") for key in folder.tensors) else None


def common_optimizer(settings: OptimizerSettings, kind: OptimizerKind, *, mixed_precision: bool) -> Any:
    """`optimizer` in the common state of a torch_dist checkpoint whose optimizer has this form."""
    if kind == "fully_reshardable":
        sharding = {"param_state_sharding_type": "fully_reshardable"}
        return chained([distributed_part(groups, settings) | sharding for groups in settings.parts], listed=False)
    inner = [plain_inner(groups, settings) for groups in settings.parts]
    return chained([plain_part(one, settings, mixed_precision=mixed_precision) for one in inner], listed=False)
