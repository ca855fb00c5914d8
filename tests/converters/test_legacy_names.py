"""Names inside a rank's model: every dialect's spelling of every parameter is understood as that parameter."""

from __future__ import annotations

import pytest

from ckptbridge.converters.mcore.legacy.names import DIALECTS, EMBEDDING, HEAD, Dialect, chunk_slots, spelled, stock_of
from ckptbridge.converters.model import open_model
from tests.conftest import TinyFolders
from tests.tiny import TINY

MODELS = ("llama", "llama_tied", "qwen2", "qwen3", "qwen2_moe_sparse", "qwen3_moe")
WITHOUT_OLDEST = ("qwen3", "qwen2_moe_sparse", "qwen3_moe")
"""The oldest modules have no experts and no norms of queries."""
CASES = [
    (name, dialect) for name in MODELS for dialect in DIALECTS if dialect != "oldest" or name not in WITHOUT_OLDEST
]


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_every_slot_is_understood(name: str, dialect: Dialect, tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder(name))
    stock = stock_of(model.family, model.config)
    layers, experts = range(1, 4), range(2, 5) if TINY[name].is_moe else range(0)
    slots = chunk_slots(dialect, stock, layers, experts, first=False, last=True)
    met: set[str] = set()
    for slot in slots:
        for key in (slot.key, f"module.{slot.key}", f"module.module.{slot.key}"):
            meaning = spelled(key)
            if slot.name is None:
                assert meaning is None, key
                continue
            assert meaning is not None
            layer = "" if meaning.layer is None else str(layers[meaning.layer])
            expert = "" if meaning.expert is None else str(experts[meaning.expert])
            names = [c.replace("{layer}", layer).replace("{expert}", expert) for c in meaning.candidates]
            known = [candidate for candidate in names if candidate in model.tensors]
            assert known[:1] == [slot.name], key
            met.add(slot.name)
    tied = {EMBEDDING} if HEAD not in model.tensors else set()
    expected = {
        key
        for key in model.tensors
        if key != EMBEDDING
        and not key.startswith("decoder.layers.0.")
        and not any(f"experts.experts.{expert}." in key for expert in (0, 1, 5, 6, 7))
    }
    assert met == expected | tied
    assert len({slot.key for slot in slots}) == len(slots)


def test_only_modules_with_weights_have_extra_states(tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder("qwen3_moe_dense_first"))
    stock = stock_of(model.family, model.config)
    for dialect in ("te", "te-sequential", "local"):
        slots = chunk_slots(dialect, stock, range(2), range(2), first=True, last=False)
        keys = [slot.key for slot in slots if slot.name is not None]
        for slot in slots:
            module = slot.key.removesuffix("_extra_state")
            if slot.name is None and not module.endswith("core_attention."):
                assert any(key.startswith(module) for key in keys), slot.key
        assert not any(slot.key.startswith("output_layer") for slot in slots)
