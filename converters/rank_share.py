"""What one rank of a parallel layout holds of a model, for whoever loads it there; nothing is read.

Reading these tensors reads the rank's own bytes and no others: rows, and columns too, of what lies in files as it is.
"""

from __future__ import annotations

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mapping import Move
from ckptbridge.converters.mcore.legacy.slices import boxes_of, cut
from ckptbridge.converters.mcore.torch_dist_writer import VOCAB_MULTIPLE
from ckptbridge.converters.model import Model
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.tensors import LazyTensor, Zeros, join_rows

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def rank_tensors(model: Model, layout: ParallelLayout, rank: int) -> dict[str, LazyTensor]:
    """The part of every parameter that a rank holds, by the parameter's name with its layer and expert numbers.

    Ranks count as Megatron-Core's do (tp fastest, pp slowest). The vocabulary is padded as Megatron pads it, and the
    last stage of a pipeline holds tied embeddings too, as `output_layer.weight`.
    Raises BadInputError for a layout that the model cannot be cut into, or a rank that it does not have.
    """
    layout.check(model.config)
    if not 0 <= rank < layout.world_size:
        raise BadInputError(f"rank {rank}: the layout has ranks 0 to {layout.world_size - 1}")
    stage, place = divmod(rank, layout.ranks_per_stage)
    held: dict[str, LazyTensor] = {}
    for move in model.family.moves(model.config):
        tensor = model.tensors[move.name]
        if _is_here(move, model, layout, stage, place):
            held[move.name] = _part(move, tensor, model, layout, place)
        is_last = layout.pp > 1 and stage == layout.pp - 1
        if move.name == _EMBEDDING and is_last and model.config.share_embeddings_and_output_weights:
            held[_OUTPUT] = _part(move, tensor, model, layout, place)
    return held


def _is_here(move: Move, model: Model, layout: ParallelLayout, stage: int, place: int) -> bool:
    """Whether the rank at a place of a pipeline stage holds some of a parameter."""
    if move.layer is not None:
        home = layout.stage_of_layer(move.layer, model.config.num_layers)
    else:
        home = 0 if move.name.startswith("embedding.") else layout.pp - 1
    if stage != home:
        return False
    experts_here = (model.config.num_moe_experts or 0) // layout.ep
    return move.expert is None or move.expert // experts_here == place // layout.expert_tp % layout.ep


def _part(move: Move, tensor: LazyTensor, model: Model, layout: ParallelLayout, place: int) -> LazyTensor:
    size = layout.tp if move.expert is None else layout.expert_tp
    multiple = VOCAB_MULTIPLE * layout.tp
    if move.layout.is_vocab and (extra := -tensor.shape[0] % multiple):
        tensor = join_rows([tensor, Zeros((extra, *tensor.shape[1:]), tensor.dtype)])
    if move.layout.tp is None:
        return tensor
    return cut(tensor, boxes_of(move.layout, tensor.shape, model.config, size)[place % size])
