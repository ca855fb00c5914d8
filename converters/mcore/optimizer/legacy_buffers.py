"""Legacy files' distributed optimizer: a rank's parameters lie in flat buffers, without a name or a shape.

Where each one begins follows from the model and from the run's arguments; the buffers' lengths are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, cast

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.mcore.legacy.names import EMBEDDING
from ckptbridge.converters.mcore.legacy.rank import LegacyRank
from ckptbridge.converters.mcore.legacy.reader import Held, LegacyFolder
from ckptbridge.converters.mcore.megatron_folder import OPTIMIZER_STATES
from ckptbridge.converters.mcore.optimizer.buffers import Flat, bucket_size, buffer_layout
from ckptbridge.converters.mcore.optimizer.ranks import BUFFERS, Chunk, RankFound, buffer_name
from ckptbridge.converters.pickles import TensorRef
from ckptbridge.converters.tensors import Stored
from ckptbridge.converters.torch_archive import read_archive, stored_tensor


def find_in_buffers(folder: LegacyFolder, rank: LegacyRank, chunks: Sequence[Chunk]) -> RankFound:
    """Every slice's states in one rank's flat buffers; none where other ranks' files have them.

    Raises BadInputError when there are other buffers, or longer ones, than the model and the args call for.
    """
    found = RankFound()
    path = rank.path.parent / BUFFERS
    if not path.exists():
        return found
    tree, storages = read_archive(path)
    saved: list[Any] = cast(list[Any], tree) if isinstance(tree, list) else [tree]
    if len(saved) not in (1, 2):
        raise BadInputError(f"{path}: holds the buffers of {len(saved)} optimizers; expected one or two")
    for number, buffers in enumerate(saved):
        if buffers is None:
            continue
        where = f"{path}: optimizer {number}" if len(saved) > 1 else str(path)
        if not isinstance(buffers, dict) or not buffers.get("buckets_coalesced"):  # pyright: ignore
            raise NotSupportedError(
                f"{where}: its buffers are saved by buckets, as before February 2024; load it with Megatron-LM's "
                "--ckpt-convert-update-legacy-dist-opt-format and save it again"
            )
        known = cast(dict[Any, Any], buffers)
        expected = _buffers(folder, rank, chunks, number, len(saved))
        if (count := sum(isinstance(key, int) for key in known)) != len(expected):
            raise BadInputError(f"{where}: holds {count} buffers, the model has {len(expected)}")
        for at, (held, starts, total) in enumerate(expected):
            for state, ref in _buffer_states(known.get(at), f"{where}: buffer {at}", total).items():
                whole = stored_tensor(ref, path, storages, f"{where}: {state} of buffer {at}")
                found.sources[buffer_name(rank.name, number, at, state)] = whole
                for one, start in zip(held, starts, strict=True):
                    offset = whole.offset + start * whole.dtype.itemsize
                    found.tensors.setdefault(id(one), {})[state] = Stored(path, offset, one.ref.shape, whole.dtype)
    return found


def _buffers(
    folder: LegacyFolder, rank: LegacyRank, chunks: Sequence[Chunk], part: int, count: int
) -> list[tuple[list[Held], list[int], int]]:
    """(parameters in the order of the model, where each begins, length) of every buffer of one optimizer."""
    args = folder.args
    numel = sum(prod(held.ref.shape) for chunk in chunks for held in chunk.held)
    ranks = getattr(args, "data_parallel_size", 1)
    size = bucket_size(args, numel=numel, data_parallel_size=ranks if isinstance(ranks, int) else 1)
    shared = folder.degrees.pp > 1 and getattr(args, "untie_embeddings_and_output_weights", True) is False
    made: list[tuple[list[Held], list[int], int]] = []
    for chunk in chunks:
        by_dtype: dict[torch.dtype, list[Held]] = {}
        for held in chunk.of_part(part, count):
            by_dtype.setdefault(held.ref.storage.dtype, []).append(held)
        for members in by_dtype.values():
            flats = [Flat(prod(h.ref.shape), alone=shared and h.move.name == EMBEDDING) for h in members]
            starts, total = buffer_layout(flats, size if rank.pp == 0 and chunk.number == 0 else None)
            made.append((members, starts, total))
    return made


def _buffer_states(saved: Any, where: str, total: int) -> dict[str, TensorRef]:
    """The tensors of one buffer. Raises BadInputError when one is missing or has another length."""
    held: Any = next(iter(cast(dict[Any, Any], saved).values()), None) if isinstance(saved, dict) else None
    if not isinstance(held, dict) or len(cast(dict[Any, Any], saved)) != 1:
        raise BadInputError(f"{where}: expected the states of one pair of dtypes")
    states: dict[str, Any] = {state: held[state] for state in OPTIMIZER_STATES if state in held}
    for state, ref in states.items():
        if not isinstance(ref, TensorRef) or ref.shape != (total,):
            found = list(ref.shape) if isinstance(ref, TensorRef) else type(ref).__name__
            raise BadInputError(
                f"{where}: {state}: expected {total} elements from the model and the args' bucket sizes, found {found}"
            )
    if missing := [state for state in OPTIMIZER_STATES if state not in states]:
        raise BadInputError(f"{where}: {missing[0]} is missing")
    return states
