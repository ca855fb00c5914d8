"""The ranks of a legacy checkpoint: which file is whose, whether all are there, and whether they are of one run."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.errors import told as short
from ckptbridge.converters.mcore.legacy.names import EMBEDDING
from ckptbridge.converters.mcore.legacy.rank import FILE, LegacyRank, open_rank

_FOLDER = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")
_MOST_RANKS = 1 << 16
_AGREED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "padded_vocab_size"),
    *("normalization", "swiglu", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights", "iteration"),
    *("rotary_base", "norm_epsilon", "params_dtype", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"),
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers", "use_distributed_optimizer"),
)
"""Arguments that the ranks of one run share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """The sizes of the parallel groups, as the files show them. `etp` of None: no argument tells it."""

    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int | None

    def pairs(self, etp: int) -> set[tuple[int, int]]:
        """The (tp, ep) ranks of a stage that Megatron saves."""
        return {(rank % self.tp, rank // etp % self.ep) for rank in range(lcm(self.tp, etp * self.ep))}


def open_ranks(folder: Path) -> tuple[Degrees, list[LegacyRank]]:
    """Every rank's file, opened and placed: sorted by pp, tp, ep.

    Raises BadInputError naming the files when some are missing or broken, or ranks are not of one run;
    NotSupportedError for a grid that file names cannot hold.
    """
    numbers = {path: _numbers(path) for path in sorted(folder.glob("mp_rank_*"))}
    ranks = [open_rank(_file(path)) for path in numbers]
    args = next((rank.args for rank in ranks if rank.args is not None), None)
    second_is_pp = _second_is_pipeline(folder, list(numbers.values()), ranks, args)
    for rank, (first, *more) in zip(ranks, numbers.values(), strict=True):
        rank.tp = first
        if len(more) == 2:
            rank.pp, rank.ep = more
        elif more:
            rank.pp, rank.ep = (more[0], 0) if second_is_pp else (0, more[0])
    ranks.sort(key=lambda rank: (rank.pp, rank.tp, rank.ep))
    for one, other in pairwise(ranks):
        if (one.tp, one.pp, one.ep) == (other.tp, other.pp, other.ep):
            raise BadInputError(f"{other.path.parent}: is the same rank as {one.path.parent}")
    degrees = _degrees(folder, ranks, args)
    _check_complete(folder, degrees, ranks)
    _check_agreement(ranks)
    _check_places(degrees, ranks)
    return degrees, ranks


def _numbers(path: Path) -> tuple[int, ...]:
    hit = _FOLDER.fullmatch(path.name)
    if hit is None or not path.is_dir():
        raise BadInputError(f"{path}: expected a folder mp_rank_TT, mp_rank_TT_NNN or mp_rank_TT_PPP_EEE")
    return tuple(int(number) for number in hit.groups() if number is not None)


def _file(folder: Path) -> Path:
    if not (folder / FILE).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise BadInputError(f"{folder / FILE}: the file is missing; the folder holds {there}")
    return folder / FILE


def _size(args: Namespace | None, *names: str) -> int | None:
    """A parallel size in the arguments: 1 or more, or None where they do not tell."""
    for name in names:
        value = getattr(args, name, None)
        if type(value) is int and value > 0:
            return value
    return None


def _second_is_pipeline(
    folder: Path, numbers: Sequence[tuple[int, ...]], ranks: Sequence[LegacyRank], args: Namespace | None
) -> bool:
    """Whether the second of two numbers is the pipeline rank: the name does not tell it from an expert rank."""
    if len({len(found) for found in numbers}) > 1:
        raise BadInputError(f"{folder}: the mp_rank folders have different numbers of parts: two checkpoints are mixed")
    if len(numbers[0]) != 2:
        return False
    pp, ep = _size(args, "pipeline_model_parallel_size"), _size(args, "expert_model_parallel_size")
    if (pp or 1) > 1 and (ep or 1) > 1:
        raise BadInputError(
            f"{folder}: the args say pipeline size {pp} and expert size {ep}, so folders are called "
            "mp_rank_TT_PPP_EEE; these have two numbers"
        )
    if (pp or 1) > 1 or (ep or 1) > 1:
        return (pp or 1) > 1
    return not all(EMBEDDING in candidates for rank in ranks for candidates in [_parameters(rank)])


def _parameters(rank: LegacyRank) -> set[str]:
    return {name for chunk in rank.spelled for key in chunk.values() for name in key.candidates[:1]}


def _degrees(folder: Path, ranks: Sequence[LegacyRank], args: Namespace | None) -> Degrees:
    found = {"tp": 1 + max(r.tp for r in ranks), "pp": 1 + ranks[-1].pp, "ep": 1 + max(r.ep for r in ranks)}
    named = {
        "tp": _size(args, "tensor_model_parallel_size", "model_parallel_size"),
        "pp": _size(args, "pipeline_model_parallel_size"),
        "ep": _size(args, "expert_model_parallel_size"),
    }
    for name, size in found.items():
        if size > (named[name] or size):
            raise BadInputError(f"{folder}: the args say {name} is {named[name]}, but there are files of {size} ranks")
    vpp = {len(rank.chunks) for rank in ranks}
    if len(vpp) > 1:
        told = ", ".join(f"{rank.name}: {len(rank.chunks)}" for rank in ranks[:8])
        raise BadInputError(f"{folder}: the files hold different numbers of model chunks ({told})")
    degrees = Degrees(
        tp=named["tp"] or found["tp"],
        pp=named["pp"] or found["pp"],
        vpp=vpp.pop(),
        ep=named["ep"] or found["ep"],
        etp=_size(args, "expert_tensor_parallel_size"),
    )
    if degrees.tp * degrees.pp * degrees.ep > _MOST_RANKS:
        raise BadInputError(
            f"{folder}: the args say tp {degrees.tp}, pp {degrees.pp}, ep {degrees.ep}: no run is so large"
        )
    if degrees.etp is not None:
        check_expert_size(folder, degrees, degrees.etp)
    return degrees


def check_expert_size(folder: Path, degrees: Degrees, etp: int) -> None:
    """Raises NotSupportedError when a (tp, ep) pair does not tell an expert's slice, so that file names cannot."""
    if etp > degrees.tp or degrees.tp % etp:
        raise NotSupportedError(
            f"{folder}: experts are cut in {etp}, other weights in {degrees.tp}; the names of legacy files carry no "
            "rank of the experts' own, so Megatron overwrote slices when it saved this. Save it as torch_dist"
        )


def _check_complete(folder: Path, degrees: Degrees, ranks: Sequence[LegacyRank]) -> None:
    """Where the ETP size is not known, every tp and every ep rank must at least be there once."""
    there = {(rank.pp, rank.tp, rank.ep) for rank in ranks}
    wanted: set[tuple[int, int, int]] = set()
    for pp in range(degrees.pp):
        if degrees.etp is not None:
            wanted |= {(pp, tp, ep) for tp, ep in degrees.pairs(degrees.etp)}
            continue
        here = [(tp, ep) for stage, tp, ep in there if stage == pp]
        wanted |= {(pp, tp, 0) for tp in range(degrees.tp) if tp not in {tp for tp, _ in here}}
        wanted |= {(pp, 0, ep) for ep in range(degrees.ep) if ep not in {ep for _, ep in here}}
    if missing := sorted(wanted - there):
        names = [rank_folder(degrees.pp > 1, degrees.ep > 1, tp, pp, ep) for pp, tp, ep in missing]
        told = ", ".join(f"{name}/{FILE}" for name in names[:8]) + (" ..." if len(names) > 8 else "")
        raise BadInputError(f"{folder}: the files of {len(names)} ranks are missing: {told}")


def rank_folder(has_pp: bool, has_ep: bool, tp: int, pp: int, ep: int) -> str:
    """The name of a rank's folder: the pipeline and the expert rank are in it only where there are several."""
    return f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if has_pp else "") + (f"_{ep:03d}" if has_ep else "")


def _check_agreement(ranks: Sequence[LegacyRank]) -> None:
    first = ranks[0]
    for rank in ranks[1:]:
        for told, one, other in _facts(first, rank):
            if short(one) != short(other):  # compared as they are told: a hostile value may take for ever to compare
                raise BadInputError(
                    f"{rank.path}: {told} is {short(other)}, but {short(one)} in {first.path}: these are files of two "
                    "checkpoints"
                )


def _facts(first: LegacyRank, rank: LegacyRank) -> Iterable[tuple[str, Any, Any]]:
    for key in ("iteration", "checkpoint_version"):
        yield key, first.tree.get(key), rank.tree.get(key)
    if first.args is not None or rank.args is not None:
        for name in _AGREED:
            yield f"args.{name}", getattr(first.args, name, None), getattr(rank.args, name, None)


def _check_places(degrees: Degrees, ranks: Sequence[LegacyRank]) -> None:
    """Megatron's args name the rank that saved them: a file under another rank's name shows.

    Converters write one number into every file, which tells nothing; nor does the pipeline rank where the args say
    that data parallel ranks are outermost.
    """
    saved_by = [getattr(rank.args, "rank", None) for rank in ranks]
    if any(type(number) is not int for number in saved_by) or len(set(saved_by)) < len(ranks):
        return
    for rank, number in zip(ranks, saved_by, strict=True):
        places = [("tensor parallel", rank.tp, (number or 0) % degrees.tp, degrees.tp)]
        world = _size(rank.args, "world_size")
        if world and world % degrees.pp == 0 and not getattr(rank.args, "use_tp_pp_dp_mapping", False):
            places.append(("pipeline", rank.pp, (number or 0) // (world // degrees.pp), degrees.pp))
        for told, by_name, by_rank, size in places:
            if by_name != by_rank:
                raise BadInputError(
                    f"{rank.path}: was saved by rank {number}, whose {told} rank is {by_rank} of {size}: it is not the "
                    f"file of {told} rank {by_name}"
                )
