"""What a recipe may not ask of Transformer Engine is refused at the start, wherever that is."""

from __future__ import annotations

from typing import Any

import pytest

from ckptbridge.converters.errors import BadInputError
from ckptbridge.trainer.recipe import Recipe
from ckptbridge.trainer.recipe_file import parse_recipe
from ckptbridge.trainer.transformer_engine.limits import refuse_beyond_transformer_engine


def recipe(**sections: Any) -> Recipe:
    return parse_recipe(
        {
            "run_folder": "run",
            "model": {"init_from": "model"},
            "data": {"text": ["*.py"], "sequence_length": 8},
            "schedule": {"total_steps": 1},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"memory": {"recompute": "full"}}, "memory.recompute"),
        ({"memory": {"recompute": "selective"}}, "memory.recompute"),
        ({"moe": {"capacity_factor": 1.5}}, "moe.capacity_factor"),
        ({"kernels": {"attention": "math"}}, "kernels.attention"),
    ],
)
def test_what_its_modules_do_not_do(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(BadInputError, match=rf"^{key}: not with kernels.backend transformer_engine: .*; leave it out"):
        refuse_beyond_transformer_engine(recipe(**sections))


def test_all_else_is_let_through() -> None:
    refuse_beyond_transformer_engine(recipe())
    refuse_beyond_transformer_engine(recipe(memory={"offload": "activations"}, optimizer={"moments": "bf16"}))
