"""Bytes as a person reads them: never a zero that is none."""

from __future__ import annotations

import pytest

from ckptbridge.converters.byte_sizes import size_in_words


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (123_456, "123.46 kB"),
        (1_710_000_000, "1.71 GB"),
        (5 * 10**15, "5000.00 TB"),
    ],
)
def test_the_unit_is_the_one_that_the_number_needs(nbytes: int, words: str) -> None:
    assert size_in_words(nbytes) == words
