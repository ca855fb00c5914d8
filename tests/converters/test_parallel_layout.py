"""Who has which layer, and which ranks exist together: held against lists written by hand and a walk over ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.parallel_layout import ParallelLayout

# As megatron-core 0.19 deals them: get_num_layers_to_build and get_transformer_layer_offset.
DEALT: list[tuple[dict[str, int], int, list[list[list[int]]]]] = [
    ({}, 3, [[[0, 1, 2]]]),
    ({"pp": 2}, 4, [[[0, 1]], [[2, 3]]]),
    ({"pp": 2, "vpp": 2}, 8, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    ({"pp": 2, "vpp": 4}, 8, [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
    ({"pp": 2, "first_stage_layers": 1}, 4, [[[0]], [[1, 2, 3]]]),
    ({"pp": 2, "last_stage_layers": 1}, 4, [[[0, 1, 2]], [[3]]]),
    ({"pp": 2, "first_stage_layers": 3, "last_stage_layers": 1}, 4, [[[0, 1, 2]], [[3]]]),
    ({"pp": 4, "first_stage_layers": 1, "last_stage_layers": 2}, 7, [[[0]], [[1, 2]], [[3, 4]], [[5, 6]]]),
    ({"pp": 2, "vpp": 2, "first_stage_layers": 2}, 6, [[[0], [3]], [[1, 2], [4, 5]]]),
    ({"pp": 3, "vpp": 2, "last_stage_layers": 2}, 10, [[[0, 1], [5, 6]], [[2, 3], [7, 8]], [[4], [9]]]),
]


@pytest.mark.parametrize(("sizes", "layers", "dealt"), DEALT, ids=str)
def test_layers_are_dealt_chunk_by_chunk(sizes: dict[str, int], layers: int, dealt: list[list[list[int]]]) -> None:
    layout = ParallelLayout(**sizes)
    assert [[list(chunk) for chunk in stage] for stage in layout.stages(layers)] == dealt
    for stage, chunks in enumerate(dealt):
        for layer in itertools.chain(*chunks):
            assert layout.stage_of_layer(layer, layers) == stage


UNDEALT: list[tuple[dict[str, int], int, str]] = [
    (
        {"pp": 3},
        4,
        "pp = 3 does not divide num_layers = 4; deal them unevenly with --decoder-first-pipeline-num-layers or "
        "--decoder-last-pipeline-num-layers",
    ),
    ({"pp": 2, "vpp": 3}, 8, "pp x vpp = 6 does not divide num_layers = 8"),
    ({"pp": 3, "first_stage_layers": 1}, 4, "3, cannot be shared evenly by the other 2 stages"),
    ({"pp": 2, "first_stage_layers": 1, "last_stage_layers": 1}, 4, "2, cannot be shared evenly by the other 0"),
    ({"pp": 2, "first_stage_layers": 9}, 4, "-5, cannot be shared"),
    ({"pp": 2, "vpp": 2, "first_stage_layers": 3}, 7, "vpp = 2 does not divide the 3 layers"),
]


@pytest.mark.parametrize(("sizes", "layers", "message"), UNDEALT, ids=str)
def test_what_cannot_be_dealt_is_refused_in_a_sentence(sizes: dict[str, int], layers: int, message: str) -> None:
    with pytest.raises(BadInputError) as refused:
        ParallelLayout(**sizes).stages(layers)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "sizes", [{"first_stage_layers": 2}, {"last_stage_layers": 2}, {"pp": 2, "first_stage_layers": 0}], ids=str
)
def test_ends_need_a_pipeline_and_a_layer(sizes: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="stage_layers"):
        ParallelLayout(**sizes)


def test_pairs_of_tp_and_ep_ranks_are_those_that_ranks_have() -> None:
    for tp, ep, etp in itertools.product((1, 2, 4), (1, 2, 4, 8), (1, 2, 4)):
        if tp % etp:
            continue
        layout = ParallelLayout(tp=tp, ep=ep, etp=etp)
        # Megatron counts tp fastest for dense weights; for experts etp, then ep, over the same ranks.
        met = {(rank % tp, rank // etp % ep) for rank in range(4 * tp * ep * etp)}
        assert layout.file_ranks() == sorted(met)
        if etp == tp:
            assert len(met) == tp * ep
