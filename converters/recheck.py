"""A folder checked again, later, against the receipt of the conversion that wrote (or read) it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ckptbridge.converters.blocks import digest_of
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.mcore.optimizer.state import every_tensor
from ckptbridge.converters.model import Model
from ckptbridge.converters.pass_through import language_config
from ckptbridge.converters.receipt import Receipt
from ckptbridge.converters.tensors import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Recheck:
    """What is no longer as the receipt says. Tensors of torch_dist are chunks, named key@offsets."""

    folder: str
    side: str
    """Which side of the conversion the folder was taken for: "target" or "source"."""
    checked: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not (self.changed or self.missing or self.unknown)

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def recheck(
    model: Model, receipt: Receipt, *, workers: int = 2, progress: Callable[[int, int], None] | None = None
) -> Recheck:
    """Compute every tensor's digest again and compare it with the receipt's.

    The folder is the conversion's target, or its source where the names say so. Raises BadInputError when the
    receipt is of neither.
    """
    sides = {"target": receipt.target_tensors, "source": receipt.source_tensors}
    sources = _as_named(model, sides)
    side = max(sides, key=lambda name: len(sides[name].keys() & sources.keys()))
    if Path(receipt.source).resolve() == model.path.resolve():  # where both have the same names, as after a reshard
        side = "source"
    expected = sides[side]
    held = sources if model.saved is None or expected.keys() <= sources.keys() else every_tensor(model)
    known = [name for name in held if name in expected]
    if not known:
        raise BadInputError(
            f"{model.path}: holds no tensor that the receipt of {receipt.source} names: it is another's"
        )
    total = sum(held[name].nbytes for name in known)
    done = 0
    changed: list[str] = []
    with ThreadPoolExecutor(workers) as pool:
        for name, digest in zip(known, pool.map(digest_of, [held[name] for name in known]), strict=True):
            if digest != expected[name]:
                changed.append(name)
            done += held[name].nbytes
            if progress:
                progress(done, total)
    return Recheck(
        folder=str(Path(model.path)),
        side=side,
        checked=len(known),
        changed=tuple(changed),
        missing=tuple(name for name in expected if name not in held),
        unknown=tuple(name for name in sources if name not in expected),
    )


def _as_named(model: Model, sides: Mapping[str, Mapping[str, str]]) -> Checkpoint:
    """The stored tensors by the names that the receipt has for them.

    Of a model with parts beside it, a receipt names what was read as the language model does, without the prefix that
    it has in the file; and what was written with it.
    """
    start = language_config(model.hf_config)[1] if model.beside else ""
    in_file = {name if name in model.beside else start + name: tensor for name, tensor in model.sources.items()}
    return max(
        (model.sources, in_file), key=lambda named: max(len(told.keys() & named.keys()) for told in sides.values())
    )
