"""Parallel layouts as people write them: `tp2,ep2,pp2ep2`."""

from __future__ import annotations

import re

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.parallel_layout import ParallelLayout

_LAYOUT = re.compile(r"(?:(?:tp|pp|ep|etp)\d+)+")
_DEGREE = re.compile(r"(etp|tp|pp|ep)(\d+)")


def parse_layouts(text: str) -> list[ParallelLayout]:
    """`tp2,pp2ep2` as layouts. What is not named is 1, but etp, whose default is Megatron's: the TP size.

    So `tp2ep2` also cuts each expert in two and takes four ranks; `tp2ep2etp1` leaves them whole and takes two.
    Raises BadInputError naming the first layout that is none.
    """
    return [_parse(part.strip().lower()) for part in text.split(",")]


def layout_name(layout: ParallelLayout) -> str:
    """What `parse_layouts` reads; `tp1` for a single rank."""
    sizes = {"tp": layout.tp, "pp": layout.pp, "ep": layout.ep}
    name = "".join(f"{degree}{size}" for degree, size in sizes.items() if size > 1)
    if layout.expert_tp != layout.tp:
        name += f"etp{layout.expert_tp}"
    return name or "tp1"


def _parse(text: str) -> ParallelLayout:
    if not _LAYOUT.fullmatch(text):
        raise BadInputError(
            f"{text!r} is no layout: write degrees of parallelism such as tp2, pp2ep2 or tp2ep2etp1, with commas "
            "between layouts; the degrees are tp, pp, ep and etp"
        )
    degrees = _DEGREE.findall(text)
    sizes = {degree: int(size) for degree, size in degrees}
    if len(sizes) < len(degrees):
        raise BadInputError(f"{text!r} names a degree twice")
    return ParallelLayout(**sizes)
