"""NaN and infinities are found wherever they stand, counted, told in the receipt, and refused when asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ckptbridge.converters.blocks import bytes_of
from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.execute import execute
from ckptbridge.converters.finite import NotFinite, not_finite
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import read_receipt
from ckptbridge.converters.safetensors_header import read_header
from tests.conftest import TinyFolders
from tests.converters.running import begin, planned

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def by_torch(values: Tensor) -> NotFinite | None:
    wide = values.double()
    bad = ~wide.isfinite()
    if not bad.any():
        return None
    return NotFinite(int(wide.isnan().sum()), int(wide.isinf().sum()), int(bad.nonzero()[0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_pattern_of_bits_is_judged_as_torch_does(dtype: torch.dtype) -> None:
    """All of them for two bytes and one; for more, those around every change of the exponent and the sign."""
    width = 8 * dtype.itemsize
    if width <= 16:
        patterns = list(range(1 << width))
    else:
        fraction = {4: 23, 8: 52}[dtype.itemsize]
        edges = [(sign << (width - 1)) | (e << fraction) for sign in (0, 1) for e in range(1 << (width - 1 - fraction))]
        patterns = [(edge + step) % (1 << width) for edge in edges for step in (-1, 0, 1)]
    whole = b"".join(pattern.to_bytes(width // 8, "little") for pattern in patterns)
    values = torch.frombuffer(bytearray(whole), dtype=BITS[dtype.itemsize]).view(dtype)
    assert not_finite(bytes_of(values), dtype) == by_torch(values)
    for value in (*values[:: max(1, len(values) // 300)], *values[-3:]):
        assert not_finite(bytes_of(value), dtype) == by_torch(value.reshape(1))


@given(
    st.sampled_from(FLOATS), st.integers(1, 700), st.dictionaries(st.integers(0, 699), st.sampled_from(["n", "+", "-"]))
)
def test_any_number_anywhere_is_counted(dtype: torch.dtype, count: int, planted: dict[int, str]) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
    for at, what in planted.items():
        if at < count:
            values[at] = {"n": float("nan"), "+": float("inf"), "-": float("-inf")}[what]
    assert not_finite(bytes_of(values), dtype) == by_torch(values)


def test_dtypes_without_infinity_hold_none() -> None:
    assert not_finite(memoryview(b"\xff" * 64), torch.int16) is None
    assert not_finite(memoryview(b""), torch.bfloat16) is None


def poisoned(source: Path, folder: Path, tensor: str, planted: dict[int, float]) -> Path:
    """A copy of a folder with other numbers at some elements of a tensor."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        if (stored := read_header(file).get(tensor)) is None:
            continue
        with file.open("r+b") as out:
            for element, value in planted.items():
                out.seek(stored.offset + element * stored.dtype.itemsize)
                out.write(bytes_of(torch.tensor(value, dtype=stored.dtype)))
    return folder


BAD = {3: float("nan"), 70: float("-inf"), 71: float("inf")}
PLACES = {  # moved whole; packed among others; cut into columns
    "norm": "model.norm.weight",
    "qkv": "model.layers.1.self_attn.k_proj.weight",
    "gated": "model.layers.2.mlp.up_proj.weight",
    "row": "model.layers.0.mlp.down_proj.weight",
    "vocabulary": "model.embed_tokens.weight",
}


@pytest.mark.parametrize(
    "options", [{}, {"layout": ParallelLayout(tp=2)}, {"dtype": torch.float16}, {"workers": 3}], ids=str
)
@pytest.mark.parametrize("place", PLACES)
def test_they_are_told_wherever_they_stand(
    place: str, options: dict[str, object], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    planted = {at: value for at, value in BAD.items() if place != "norm" or at < 64}
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES[place], planted)
    receipt = execute(planned(source, tmp_path / "target", **options))
    told = {"nan": 1, "infinite": len(planted) - 1}
    assert receipt.not_finite == {PLACES[place]: told}
    assert read_receipt(tmp_path / "target") == receipt
    assert any(PLACES[place] in note and "element 3" in note for note in receipt.notes)
    with pytest.raises(BadInputError) as refused:
        execute(planned(source, tmp_path / "refused", check_finite=True, **options))
    for word in (PLACES[place], "model.safetensors", "1 NaN", f"{told['infinite']} infinite", "element 3"):
        assert word in str(refused.value)
    assert not (tmp_path / "refused").exists()


def test_they_are_told_on_the_way_back_too(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES["gated"], BAD)
    execute(planned(source, tmp_path / "mcore"))
    back = execute(planned(tmp_path / "mcore", tmp_path / "hf", "hf"))
    assert list(back.not_finite.values()) == [{"nan": 1, "infinite": 2}]
    assert "linear_fc1" in next(iter(back.not_finite))


def test_a_sound_model_has_none(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    receipt = execute(planned(tiny_folder("mixtral"), tmp_path / "target", check_finite=True))
    assert receipt.not_finite == {}
    assert not any("finite" in note for note in receipt.notes)


def test_a_resumed_run_remembers_them(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """They stand in a file that was finished before the interruption."""
    source = poisoned(tiny_folder("llama"), tmp_path / "source", PLACES["vocabulary"], BAD)
    target = tmp_path / "target"
    begin(planned(source, target), 0.9)
    first = json.loads((tmp_path / "target.partial.journal").read_text().splitlines()[1])
    assert first["bad"]
    with pytest.raises(BadInputError, match="check-finite"):
        execute(planned(source, target, resume=True, check_finite=True))
    assert list(execute(planned(source, target, resume=True)).not_finite) == [PLACES["vocabulary"]]
