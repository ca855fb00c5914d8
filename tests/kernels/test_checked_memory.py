"""The memory and race checker of the interpreter sees what it is there to see."""

from __future__ import annotations

import pytest
import torch

from ckptbridge.kernels.backend import jit, tl

# Without a GPU alone: on one, compute-sanitizer looks at the same tests.
ON_CPU = not torch.cuda.is_available()
N = 32


@jit
def _copy(x_ptr, out_ptr, read_offset, write_offset, BLOCK: tl.constexpr):
    """A block a program, each read and written so many elements off its place."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place + write_offset, tl.load(x_ptr + place + read_offset))


@jit
def _first_of_all(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Every program writes the same elements."""
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)))


@jit
def _collide(out_ptr, BLOCK: tl.constexpr):
    """Two lanes write different values to each element."""
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes // 2, lanes.to(tl.float32))


@jit
def _agree(out_ptr, BLOCK: tl.constexpr):
    """Two lanes write the same value to each element."""
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes // 2, (lanes // 2).to(tl.float32))


def _x_and_out() -> tuple[torch.Tensor, torch.Tensor]:
    """In the middle of larger buffers, so that a neighbour's memory is no error that anything else sees."""
    return torch.zeros(3 * N)[N : 2 * N], torch.zeros(3 * N)[N : 2 * N]


def _launch(kernel, *arguments, programs: int = 2, block: int = N // 2) -> None:
    kernel[(programs,)](*arguments, BLOCK=block)


@pytest.mark.parametrize("on_cpu", [True] if ON_CPU else [])
class TestFound:
    def test_nothing_in_a_sound_kernel(self, on_cpu):
        x, out = _x_and_out()
        _launch(_copy, x, out, 0, 0)
        _launch(_copy, x, x, 0, 0)
        _launch(_agree, out, programs=1)

    @pytest.mark.parametrize(
        ("offsets", "message"),
        [
            ((1, 0), "program 1 reads 1 elements outside its tensors, the first 0 bytes behind one"),
            ((-1, 0), "program 0 reads 1 elements outside its tensors, the first 4 bytes before one"),
            ((0, 2), "program 1 writes 2 elements outside its tensors, the first 0 bytes behind one"),
        ],
    )
    def test_an_access_beside_a_tensor(self, on_cpu, offsets, message):
        with pytest.raises(Exception, match=message):
            _launch(_copy, *_x_and_out(), *offsets)

    def test_two_programs_that_write_one_element(self, on_cpu):
        with pytest.raises(Exception, match="program 1 writes what program 0 wrote"):
            _launch(_first_of_all, *_x_and_out())

    def test_a_program_that_reads_what_another_writes(self, on_cpu):
        buffer = torch.zeros(3 * N)
        with pytest.raises(Exception, match="program 1 reads what program 0 wrote"):
            _launch(_copy, buffer, buffer, 0, N // 2)
        with pytest.raises(Exception, match="program 1 writes what program 0 read"):
            _launch(_copy, buffer, buffer, N // 2, 0)

    def test_lanes_that_disagree(self, on_cpu):
        with pytest.raises(Exception, match="program 0 writes two values to one element"):
            _launch(_collide, torch.zeros(N), programs=1)
