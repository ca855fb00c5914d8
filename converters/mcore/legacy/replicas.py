"""Copies of one tensor in several ranks' files, compared: a run whose ranks have drifted apart has no one model."""

from __future__ import annotations

from collections.abc import Iterator

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.mcore.legacy.reader import LegacyFolder
from ckptbridge.converters.mcore.megatron_folder import MegatronFolder
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.reading import read_exactly
from ckptbridge.converters.tensors import Stored

WHOLE_NBYTES = 1 << 20
"""Copies up to this size are compared whole: norms, biases, small routers."""
_SPOT_NBYTES = 1 << 16


def check_replicas(folder: MegatronFolder | None, family: Family, config: ModelConfig) -> None:
    """Compare what several ranks of a legacy checkpoint hold; other formats hold everything once.

    Of tensors above `WHOLE_NBYTES` the beginning, the middle and the end are compared: copies that training let
    drift apart differ everywhere, and reading all of them would cost as much as reading the model.
    Raises BadInputError naming the parameter and both files.
    """
    if not isinstance(folder, LegacyFolder):
        return
    for name, used, other in folder.replicas(family, config):
        if any(_bytes(used, at, n) != _bytes(other, at, n) for at, n in _spots(used.nbytes)):
            raise BadInputError(
                f"{other.path}: its copy of {name} differs from the one in {used.path}: the ranks of the run that "
                "saved this have drifted apart, or these are files of two checkpoints"
            )


def _spots(nbytes: int) -> Iterator[tuple[int, int]]:
    if nbytes <= WHOLE_NBYTES:
        yield 0, nbytes
        return
    for at in (0, (nbytes - _SPOT_NBYTES) // 2, nbytes - _SPOT_NBYTES):
        yield at, _SPOT_NBYTES


def _bytes(tensor: Stored, at: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    read_exactly(tensor.path, tensor.offset + at, memoryview(buffer))
    return bytes(buffer)
