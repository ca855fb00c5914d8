"""Megatron-Core's `torch_dist` folder, planned before a tensor is read: every file, archive and offset.

Files hold global tensors, so any layout loads them; the named layout decides how chunks are cut, so that a
rank of that layout reads its own bytes and no others, and which series of files they go to.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.inert_pickles import saved
from ckptbridge.converters.layout import Box
from ckptbridge.converters.mapping import Family, Move
from ckptbridge.converters.mcore.args import make_args
from ckptbridge.converters.mcore.distributed_metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    pickled,
)
from ckptbridge.converters.mcore.keys import address_of, extra_state_keys, state_prefix
from ckptbridge.converters.mcore.megatron_folder import MegatronPlan
from ckptbridge.converters.mcore.torch_dist_reader import COMMON_KEY
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.output import OutputFile, Piece
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, Zeros, columns, join_rows, rows
from ckptbridge.converters.torch_archive import SAVED_DTYPES, tensor_archive

VOCAB_MULTIPLE = 128
"""Megatron's --make-vocab-size-divisible-by, times the TP size."""
_ALIGNMENT = 64


@dataclass(slots=True, kw_only=True)
class TorchDistWriter:
    """Collects tensors and objects and lays them out.

    `per_layer_keys` forces the layer number into the keys; Megatron's own config asks for that when the
    layers are not alike.
    """

    family: Family
    config: ModelConfig
    layout: ParallelLayout
    dtype: torch.dtype
    max_file_size: int
    per_layer_keys: bool = False
    target_mcore: tuple[int, int] | None = None
    _open: dict[int, OutputFile] = field(default_factory=dict[int, OutputFile])
    _files: list[OutputFile] = field(default_factory=list[OutputFile])
    _keys: dict[str, _Key] = field(default_factory=dict[str, "_Key"])
    _objects: dict[str, StorageInfo] = field(default_factory=dict[str, StorageInfo])
    _boxes: dict[tuple[str, tuple[int, ...], int], list[list[Box]]] = field(default_factory=dict[Any, Any])

    @property
    def padded_vocab_size(self) -> int:
        multiple = VOCAB_MULTIPLE * self.layout.tp
        return -(-self.config.vocab_size // multiple) * multiple

    @property
    def layers_in_keys(self) -> bool:
        return self.per_layer_keys or not self.config.layers_are_alike

    def add_model(self, tensors: Checkpoint, state: str = "") -> None:
        """One state of every parameter, by its name with layer and expert numbers.

        A state of the optimizer may be there for some parameters only: fp32 weights have no second copy.
        """
        for move in self.family.moves(self.config):
            if not state or move.name in tensors:
                self._add_parameter(move, tensors[move.name], state_prefix(state))

    def add_object(self, key: str, blob: bytes) -> None:
        """An object as another checkpoint holds it, byte for byte."""
        self._add_object(self._series(0), [key], blob)

    def plan(
        self,
        common: Mapping[str, Any],
        *,
        args: Namespace | None = None,
        iteration: int = 0,
        content_metadata: Mapping[str, Any] | None = None,
    ) -> MegatronPlan:
        """The files of everything that was added, with `common` beside the args and Megatron's own items."""
        state: dict[str, Any] = {
            "args": args or self.args(),
            "checkpoint_version": 3.0,
            "iteration": iteration,
            "content_metadata": {**self._content_metadata(), **(content_metadata or {})},
            **common,
        }
        self._add_extra_state()
        first = self._series(0)
        if self.target_mcore is None or self.target_mcore >= (0, 17):
            self._add_object(first, [COMMON_KEY], saved([state]))
        last: list[tuple[str, bytes]] = []
        if self.target_mcore is None or self.target_mcore < (0, 19):
            last.append(("common.pt", saved(state)))
        last.append((".metadata", pickled(self._metadata())))
        last.append(
            (
                "metadata.json",
                json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}).encode(),
            )
        )
        return MegatronPlan(files=self._files, last=last)

    def args(self) -> Namespace:
        """The arguments that describe this model and layout."""
        return make_args(
            self.config,
            padded_vocab_size=self.padded_vocab_size,
            layout=self.layout,
            dtype=self.dtype,
            ckpt_format="torch_dist",
        )

    def _content_metadata(self) -> dict[str, Any]:
        forced = {"non_homogeneous_layers": True} if self.per_layer_keys and self.config.layers_are_alike else {}
        return {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **forced}

    def _add_parameter(self, move: Move, tensor: LazyTensor, prefix: str) -> None:
        layout, config = self.layout, self.config
        if move.layout.is_vocab and (extra := self.padded_vocab_size - tensor.shape[0]):
            tensor = join_rows([tensor, Zeros((extra, *tensor.shape[1:]), tensor.dtype)])
        stage = 0 if move.name.startswith("embedding.") else layout.pp - 1
        if move.layer is not None:
            stage = layout.stage_of_layer(move.layer, config.num_layers)
        address = address_of(move.name, config, per_layer_keys=self.layers_in_keys)
        size = layout.tp if move.expert is None else layout.expert_tp
        kind = (move.layout.name, tensor.shape, size)
        ranks = self._boxes.get(kind)
        if ranks is None:
            ranks = self._boxes[kind] = move.layout.boxes(tensor.shape, config, size)
        for tp_rank, boxes in enumerate(ranks if move.layout.tp is not None else ranks[:1]):
            rank = (
                layout.rank_of(stage, tp_rank)
                if move.expert is None
                else layout.rank_of_expert(stage, move.expert, config.num_moe_experts or 1, tp_rank)
            )
            for box in boxes:
                self._add_chunk(rank, prefix + address.key, address.axes, address.index, tensor, box)

    def _add_chunk(
        self, rank: int, key: str, axes: tuple[int, ...], index: tuple[int, ...], tensor: LazyTensor, box: Box
    ) -> None:
        part = rows(tensor, box.row, box.row + box.rows)
        corner: tuple[int, ...] = (box.row,) + (0,) * (len(tensor.shape) - 1)
        if box.columns is not None:
            part = columns(part, box.column, box.column + box.columns)
            corner = (box.row, box.column)
        if tensor.dtype not in SAVED_DTYPES:
            raise NotSupportedError(f"{key}: torch_dist cannot hold {tensor.dtype} here; convert with --dtype bf16")
        offsets, sizes = (*index, *corner), (*(1 for _ in axes), *part.shape)
        archive = tensor_archive(sizes, tensor.dtype)
        file = self._series(rank, archive.size)
        at = -(-file.size // _ALIGNMENT) * _ALIGNMENT
        name = f"{key}@{','.join(map(str, offsets))}"
        file.pieces.append(Piece(name, at + archive.data_offset, part, partial(archive.frame, at)))
        file.size = at + archive.size
        known = self._keys.get(key)
        if known is None:
            known = self._keys[key] = _Key(tensor.dtype, (*axes, *tensor.shape), [])
        if known.dtype != tensor.dtype:
            raise BadInputError(
                f"{key}: some of its layers or experts are {known.dtype}, others {tensor.dtype}, but a key "
                "has one dtype: convert with --dtype, or with --per-layer-keys where the layers differ"
            )
        known.chunks.append((offsets, sizes, file.name, at, archive.size))

    def _add_extra_state(self) -> None:
        """One empty tensor serves every key: what Transformer Engine itself saves outside fp8."""
        keys = list(extra_state_keys(self.config, per_layer_keys=self.layers_in_keys))
        self._add_object(self._series(0), keys, saved([torch.empty(0, dtype=torch.uint8)]))

    def _add_object(self, file: OutputFile, keys: Iterable[str], blob: bytes) -> None:
        at = -(-file.size // _ALIGNMENT) * _ALIGNMENT
        file.patches.append((at, blob))
        file.size = at + len(blob)
        for key in keys:
            self._objects[key] = StorageInfo(file.name, at, len(blob))

    def _series(self, rank: int, nbytes: int = 0) -> OutputFile:
        """The file that a rank's next bytes go to: a new one when they would exceed the size."""
        file = self._open.get(rank)
        if file is None or (file.pieces and file.size + nbytes > self.max_file_size):
            count = 0 if file is None else int(file.name.split("_")[-1].split(".")[0]) + 1
            file = OutputFile(f"__{rank}_{count}.distcp")
            self._open[rank] = file
            self._files.append(file)
        return file

    def _metadata(self) -> Metadata:
        tensors: dict[str, Any] = {key: known.described() for key, known in self._keys.items()}
        return Metadata(
            state_dict_metadata=tensors | dict.fromkeys(self._objects, BytesStorageMetadata()),
            storage_data=self._storage(),
            storage_meta=StorageMeta(save_id=self._plan_id()),
            version="1.0.0",
        )

    def _storage(self) -> Iterator[tuple[MetadataIndex, StorageInfo]]:
        for key, known in self._keys.items():
            for count, (offsets, _, file, at, nbytes) in enumerate(known.chunks):
                yield MetadataIndex(key, torch.Size(offsets), count), StorageInfo(file, at, nbytes)
        for key, info in self._objects.items():
            yield MetadataIndex(key), info

    def _plan_id(self) -> str:
        """An id that follows from the plan, so that a resumed conversion ends with the same bytes."""
        text = hashlib.sha256()
        for key, known in self._keys.items():
            text.update(f"{key}:{known}".encode())
        for key, info in self._objects.items():
            text.update(f"{key}:{info}".encode())
        return str(uuid.UUID(bytes=text.digest()[:16], version=5))


class _Key(NamedTuple):
    """What was added under one key. A chunk is (offsets, sizes, file, where its archive begins, its bytes)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]]

    def described(self) -> TensorStorageMetadata:
        """The same in torch's words, one chunk at a time: hundreds of thousands of objects would take 0.2 GB."""
        return TensorStorageMetadata(
            properties=TensorProperties(dtype=self.dtype),
            size=torch.Size(self.shape),
            chunks=(ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes, *_ in self.chunks),
        )
