"""The command line with which Megatron-LM goes on from a checkpoint: pretrain_gpt.py's flags, but those of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mcore.flags import Flag, layout_flags, model_flags
from ckptbridge.converters.mcore.torch_dist_reader import TRACKER
from ckptbridge.converters.mcore.torch_dist_writer import VOCAB_MULTIPLE
from ckptbridge.converters.parallel_layout import ParallelLayout

if TYPE_CHECKING:
    from ckptbridge.converters.mcore.megatron_folder import MegatronFolder
    from ckptbridge.converters.model import Model

_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first_stage_layers": "decoder_first_pipeline_num_layers",
    "last_stage_layers": "decoder_last_pipeline_num_layers",
}
_DTYPES: dict[torch.dtype, Flag] = {torch.bfloat16: ("--bf16",), torch.float16: ("--fp16",)}
_TOKENIZER = {"tokenizer.json", "tokenizer.model", "vocab.json"}


def megatron_command(model: Model, sizes: dict[str, int]) -> list[Flag]:
    """Every flag that describes the checkpoint, the model and its layout: none of data, batches and learning rates.

    `sizes` are fields of ParallelLayout that shall be other ones than the checkpoint's arguments record. Raises
    BadInputError for a layout that does not fit the model, or that is not the one of a checkpoint whose files are cut,
    and NotSupportedError for a checkpoint that is not Megatron's.
    """
    if model.saved is None:
        raise NotSupportedError(f"{model.path}: is a {model.format} checkpoint, expected a Megatron one")
    layout = _layout(model, model.saved, sizes)
    layout.check(model.config)
    copied = model.saved.args is not None
    padded: Any = getattr(model.saved.args, "padded_vocab_size", None)
    return [
        *_checkpoint(model, model.saved),
        *([("--use-checkpoint-args",)] if copied else []),
        *layout_flags(layout, model.config),
        *(_repadded(padded, layout.tp) if isinstance(padded, int) else []),
        *([_DTYPES[model.dtype]] if model.dtype in _DTYPES else []),
        *model_flags(model.config, copied=copied),
    ]


def _repadded(padded: int, tp: int) -> list[Flag]:
    """The size that is copied is not padded again: one that TP does not divide is replaced."""
    return (
        [("--padded-vocab-size", str(-(-padded // (VOCAB_MULTIPLE * tp)) * VOCAB_MULTIPLE * tp))] if padded % tp else []
    )


def _layout(model: Model, saved: MegatronFolder, sizes: dict[str, int]) -> ParallelLayout:
    known = {
        field: size for field, name in _SIZES.items() if type(size := getattr(saved.args, name, None)) is int and size
    }
    if model.config.num_moe_experts is None:  # Megatron-LM records them of dense models too
        known = {field: size for field, size in known.items() if field not in ("ep", "etp")}
    if model.format == "torch":
        for field, size in sizes.items():
            if size != (cut := known.get(field, 1)):
                raise BadInputError(
                    f"{saved.path}: its files are cut for {field} = {cut}, expected {size}; "
                    f"cut it anew with `ckptbridge reshard`, or leave {field} out"
                )
    if model.config.num_moe_experts and model.config.add_mlp_bias:  # Megatron-LM refuses to cut their biases
        if sizes.get("etp", 1) > 1:
            raise BadInputError(f"etp is {sizes['etp']}, but Megatron-LM does not cut experts that have biases: give 1")
        known["etp"] = 1
    if sizes.keys() & {"tp", "pp", "vpp"}:  # what follows from the degrees that were saved fits these no more
        for field, decides in (("etp", "tp"), ("vpp", "pp"), ("first_stage_layers", "pp"), ("last_stage_layers", "pp")):
            if decides in sizes and sizes[decides] != known.get(decides, 1):
                known.pop(field, None)
    return ParallelLayout(**known | sizes)


def _checkpoint(model: Model, saved: MegatronFolder) -> list[Flag]:
    """Where the checkpoint lies and what it holds beside the weights."""
    tracked = (saved.path.parent / TRACKER).is_file()
    flags: list[Flag] = [("--load", str((saved.path.parent if tracked else saved.path).absolute()))]
    flags.append(("--ckpt-format", model.format))
    if model.format == "fsdp_dtensor":
        flags.append(("--use-megatron-fsdp",))
    if tracked and (saved.path.parent / TRACKER).read_text().strip() not in ("release", str(model.iteration)):
        flags.append(("--ckpt-step", str(model.iteration)))
    args: Any = saved.args
    if getattr(args, "transformer_impl", None) == "local":
        flags.append(("--transformer-impl", "local"))
    if saved.path.name != "release":
        flags += [] if saved.states() else [("--no-load-optim",)]
        flags += [("--no-load-rng",)] if getattr(args, "no_save_rng", None) else []
        if saved.states() and getattr(args, "use_distributed_optimizer", False):
            flags.append(("--use-distributed-optimizer",))
    if (folder := _tokenizer_folder(model)) is not None:
        flags += [("--tokenizer-type", "HuggingFaceTokenizer"), ("--tokenizer-model", str(folder.absolute()))]
    return flags


def _tokenizer_folder(model: Model) -> Path | None:
    return next((asset.parent for asset in model.assets if asset.name in _TOKENIZER), None)
