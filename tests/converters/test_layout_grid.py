"""A few of the formats and layouts that benchmarks/round_trips.py goes through, of every tiny model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import TinyFolders
from tests.converters.layout_grid import FORMATS, LEGACY, Tally, Traveller, Way, expected, ways
from tests.tiny import TINY


@pytest.mark.parametrize("name", TINY)
def test_there_and_back_in_a_random_layout_of_every_format(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    tally, rng = Tally(), random.Random(name)
    traveller = Traveller(tiny_folder(name), tmp_path, tally)
    config = traveller.model.config
    every = ways(config.num_moe_experts is not None)
    good = [way for way in every if not expected(way, config)]
    formats = [form for form in FORMATS if any(way.form == form for way in good)]
    for form in formats:
        traveller.there_and_back(rng.choice([way for way in good if way.form == form]))
    for way in rng.sample([way for way in every if expected(way, config)], 6):
        traveller.there_and_back(way)
    for _ in range(2):
        traveller.through(rng.choice(good), rng.choice(good))
    assert not tally.failures
    assert (tally.identical, tally.resharded) == (len(formats), 2)
    assert sum(tally.refused.values()) == 6


def test_a_wrong_expectation_shows(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    tally = Tally()
    traveller = Traveller(tiny_folder("llama"), tmp_path, tally)
    traveller.there_and_back(Way(form="torch_dist", tp=3))
    assert tally.refused == {"heads do not split": 1}
    traveller.held["model.norm.weight"] = traveller.held["model.norm.weight"] + 1
    traveller.there_and_back(Way(form="torch_dist"))
    traveller.through(Way(form="torch_dist"), Way(form=LEGACY[0], tp=2))
    assert [failure.partition(": ")[2] for failure in tally.failures] == ["model.norm.weight differs"] * 2
