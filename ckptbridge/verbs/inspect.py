"""`inspect`: what a checkpoint is, whether it is complete, and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptbridge import options as o
from ckptbridge.errors import exits
from ckptbridge.flags import takes_flags

if TYPE_CHECKING:
    from pathlib import Path

    from ckptbridge.converters.model import Model
    from ckptbridge.converters.tensors import LazyTensor


@exits
@takes_flags
def inspect(path: o.Source, read: o.ReadFlags, tell: o.TellFlags) -> None:
    """Show a checkpoint of either side: format, model, tensors folded by layer, sizes, parameters.

    Of one that is not understood as a model, the tensors are shown as they stand in the files; exit code 3 then.
    """
    from ckptbridge import report
    from ckptbridge.converters.errors import BadInputError
    from ckptbridge.verbs.convert import opened

    try:
        model = opened(path, read, "headers")
    except BadInputError:
        if not tell.silent and Path(path).exists():
            with suppress(BadInputError):  # the first error says what is wrong
                _show_as_stored(Path(path))
        raise
    if tell.as_json:
        report.print_json(description(model))
    elif not tell.quiet:
        _show(model)


def description(model: Model) -> dict[str, Any]:
    """What `inspect --json` prints."""
    from ckptbridge.converters.model import count_parameters

    total, active = count_parameters(model.tensors, model.config)
    nbytes, stored = _nbytes_by_dtype(model.tensors.values()), _nbytes_by_dtype(model.sources.values())
    return {
        "path": str(model.path),
        "format": model.format,
        "complete": True,
        "family": model.family.name,
        "architecture": model.family.architecture,
        "iteration": model.iteration,
        "parameters": total,
        "active_parameters": active,
        "nbytes": sum(nbytes.values()),
        "nbytes_by_dtype": nbytes,
        "stored_nbytes_by_dtype": stored,
        "config": asdict(model.config),
        "layout": _saved_layout(model),
        "optimizer": list(model.saved.states()) if model.saved else [],
        "tensors": [
            {"name": name, "count": many, "shape": shape, "dtype": dtype}
            for name, many, shape, dtype in _folded_tensors(model.tensors.items())
        ],
        "notes": list(model.notes),
    }


def _nbytes_by_dtype(tensors: Iterable[LazyTensor]) -> dict[str, int]:
    nbytes: Counter[str] = Counter()
    for tensor in tensors:
        nbytes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(nbytes)


def _saved_layout(model: Model) -> dict[str, int] | None:
    """The parallel sizes that a Megatron checkpoint's arguments record."""
    if model.saved is None:
        return None
    names = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size",
        "ep": "expert_model_parallel_size",
        "etp": "expert_tensor_parallel_size",
    }
    args = model.saved.args
    return {short: size for short, name in names.items() if isinstance(size := getattr(args, name, None), int)}


def _folded_tensors(tensors: Iterable[tuple[str, LazyTensor]]) -> list[tuple[str, int, list[int], str]]:
    from ckptbridge.converters.fold import folded

    groups: dict[tuple[tuple[int, ...], str, str], list[str]] = {}
    for name, tensor in tensors:
        parts = [part for part in name.split(".") if not part.isdigit()]
        kind = (tensor.shape, str(tensor.dtype).removeprefix("torch."), ".".join(parts))
        groups.setdefault(kind, []).append(name)
    return [(", ".join(folded(names)), len(names), list(shape), dtype) for (shape, dtype, _), names in groups.items()]


def _show_as_stored(path: Path) -> None:
    """The tensors of a checkpoint whose model is not known. Raises BadInputError when the files cannot be read."""
    from ckptbridge import report
    from ckptbridge.converters.formats import detect_format, open_megatron
    from ckptbridge.converters.hf_folder import open_hf_folder

    found = detect_format(path)
    tensors = open_hf_folder(path).tensors if found == "hf" else open_megatron(path, found).sources()
    report.out.print(f"[bold]{path}[/]: {found}, {len(tensors)} tensors as they stand in the files", soft_wrap=True)
    # A chunk of torch_dist is named key@offsets: chunks of one shape are told together.
    _print_tensors(_folded_tensors((name.partition("@")[0], tensor) for name, tensor in tensors.items()))


def _print_tensors(tensors: list[tuple[str, int, list[int], str]]) -> None:
    from ckptbridge import report

    table = report.table("parameter", "count", "shape", "dtype")
    for name, many, shape, dtype in tensors:
        table.add_row(name, str(many), "x".join(map(str, shape)), dtype)
    report.out.print(table)


def _show(model: Model) -> None:
    from ckptbridge import report

    info, config = description(model), model.config
    experts = (
        f", {config.num_moe_experts} experts of {config.moe_ffn_hidden_size}, top-{config.moe_router_topk}"
        if config.num_moe_experts
        else ""
    )
    report.out.print(f"[bold]{info['path']}[/]: {info['architecture']} as {info['format']}, complete", soft_wrap=True)
    dtypes = [
        ", ".join(f"{dtype}: {report.size(n)}" for dtype, n in info[which].items())
        for which in ("nbytes_by_dtype", "stored_nbytes_by_dtype")
    ]
    report.out.print(
        f"{report.count(info['parameters'])} parameters ({report.count(info['active_parameters'])} active), "
        f"{report.size(info['nbytes'])}, {dtypes[0]}"
        + (f"; in the files {dtypes[1]}" if model.format == "hf" and dtypes[0] != dtypes[1] else ""),
        soft_wrap=True,
    )
    report.out.print(
        f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_attention_heads} heads in "
        f"{config.num_query_groups} groups of width {config.kv_channels}, vocabulary {config.vocab_size}{experts}"
    )
    if info["layout"]:
        report.out.print(
            "saved for "
            + ", ".join(f"{name} {size}" for name, size in info["layout"].items())
            + f", iteration {model.iteration}"
        )
    if info["optimizer"]:
        report.out.print(f"with the optimizer's {', '.join(info['optimizer'])}")
    _print_tensors(_folded_tensors(model.tensors.items()))
    report.notes(model.notes)
