"""What a plan promises, what progress tells, how much memory is taken, and what the receipt proves."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.execute import execute, partial_folder
from ckptbridge.converters.parallel_layout import ParallelLayout
from ckptbridge.converters.receipt import RECEIPT_NAME, read_receipt
from tests.conftest import TinyFolders
from tests.converters.running import ROOT, begin, planned
from tests.tiny import TINY


@pytest.mark.parametrize("to", ["torch_dist", "hf"])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2_moe", "mixtral"])
def test_the_plan_tells_what_comes_and_writes_nothing(
    name: str, to: str, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    plan = planned(tiny_folder(name), target, to)
    assert not any(tmp_path.iterdir())
    told = json.loads(json.dumps(plan.to_json()))
    receipt = execute(plan)
    sizes = {str(p.relative_to(target)): p.stat().st_size for p in target.rglob("*") if p.is_file()}
    assert {name: sizes[name] for name in told["files"]} == told["files"] == receipt.files
    assert set(sizes) == {*told["files"], *told["other_files"], RECEIPT_NAME}
    assert told["nbytes"] == receipt.target_nbytes
    assert told["tensors_in"] == len(receipt.source_tensors)
    assert told["tensors_out"] == len(receipt.target_tensors)


@pytest.mark.parametrize("workers", [1, 4])
def test_progress_grows_to_the_whole(workers: int, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    plan = planned(tiny_folder("mixtral"), tmp_path / "a", workers=workers, dtype=torch.bfloat16)
    execute(plan, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (plan.nbytes, plan.nbytes)
    begin(planned(tiny_folder("mixtral"), tmp_path / "b"))
    seen.clear()
    plan = planned(tiny_folder("mixtral"), tmp_path / "b", resume=True)
    execute(plan, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (plan.nbytes, plan.nbytes)


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_64(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def hf_digests(folder: Path) -> dict[str, str]:
    """The digests of a Hugging Face folder's tensors, computed without the package."""
    return {name: digest(tensor) for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", TINY)
def test_the_receipt_holds_the_digest_of_every_tensor(name: str, tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source = tiny_folder(name)
    there = execute(planned(source, tmp_path / "mcore", layout=ParallelLayout(tp=2)))
    assert there.source_tensors == hf_digests(source)
    back = execute(planned(tmp_path / "mcore", tmp_path / "hf", "hf"))
    assert back.target_tensors == hf_digests(source) == hf_digests(tmp_path / "hf")
    assert back.source_tensors == there.target_tensors
    assert read_receipt(tmp_path / "hf") == back
    assert back.source_nbytes >= back.target_nbytes  # the vocabulary's padding stays behind
    cast = execute(planned(source, tmp_path / "half", "hf", dtype=torch.bfloat16))
    assert cast.source_tensors == hf_digests(source)
    assert cast.target_tensors == hf_digests(tmp_path / "half")


def test_a_flipped_bit_is_found_by_the_receipt(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    receipt = execute(planned(tiny_folder("llama"), tmp_path / "hf", "hf", max_shard_size=10**9))
    file = tmp_path / "hf" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x10
    file.write_bytes(data)
    found = hf_digests(tmp_path / "hf")
    wrong = [name for name, value in receipt.target_tensors.items() if found[name] != value]
    assert wrong == [list(receipt.target_tensors)[-1]]


def test_the_receipt_goes_where_it_is_wanted(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    wanted = tmp_path / "mine.json"
    receipt = execute(planned(tiny_folder("llama"), tmp_path / "target", receipt=wanted))
    assert read_receipt(wanted) == receipt
    assert not (tmp_path / "target" / RECEIPT_NAME).exists()
    for text in ("", "[]", "{}", '{"notes": 3}', '{"notes": [], "surprise": 1}'):
        wanted.write_text(text)
        with pytest.raises(BadInputError, match=r"mine\.json"):
            read_receipt(wanted)
    with pytest.raises(BadInputError, match="missing"):
        read_receipt(tmp_path / "target")


def test_a_target_that_cannot_be_made_is_the_disks_fault(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        execute(planned(tiny_folder("llama"), tmp_path / "file" / "target"))


MEMORY = """
import sys
from pathlib import Path
import torch
from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute, partial_folder
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout

def high_water():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
execute(plan_conversion(open_model(Path(sys.argv[1])), Path(sys.argv[3]) / "first", "torch_dist"))  # warms everything
options = ConvertOptions(layout=ParallelLayout(tp=8), dtype=torch.bfloat16, max_ram=32 << 20, workers=2)
plan = plan_conversion(open_model(Path(sys.argv[2])), Path(sys.argv[3]) / "target", "torch_dist", options)
Path("/proc/self/clear_refs").write_text("5")
before = high_water()
execute(plan)
sys.stdout.write('{"grown": %d, "stated": %d}' % (high_water() - before, plan.peak_ram))
"""


def test_memory_stays_below_the_bound(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    """A matrix of 67 MB is cut into columns and cast: neither may take it into memory whole."""
    source = tmp_path / "wide"
    source.mkdir()
    hidden, ffn, vocab = 1024, 16384, 128
    held = {"model.embed_tokens.weight": torch.zeros(vocab, hidden), "lm_head.weight": torch.zeros(vocab, hidden)}
    held |= {name: torch.ones(hidden) for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight")}
    held["model.layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    held |= {f"model.layers.0.self_attn.{part}_proj.weight": torch.zeros(hidden, hidden) for part in "qkvo"}
    held |= {f"model.layers.0.mlp.{part}_proj.weight": torch.zeros(ffn, hidden) for part in ("gate", "up")}
    held["model.layers.0.mlp.down_proj.weight"] = torch.zeros(hidden, ffn)
    save_file(held, source / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    config |= {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": 8}
    (source / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", MEMORY, str(tiny_folder("llama")), str(source), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["stated"] <= 32 << 20
    assert told["grown"] <= told["stated"] + (12 << 20), told  # 12 MiB: the allocator's and the threads' own


def test_nothing_is_left_open(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    execute(planned(tiny_folder("mixtral"), tmp_path / "a", workers=4))
    begin(planned(tiny_folder("mixtral"), tmp_path / "b"))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_run_that_is_started_again_knows_that_all_is_done(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(tiny_folder("llama"), source)
    receipt = execute(planned(source, target))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert execute(planned(source, target, resume=True)) == receipt
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    for other in (planned(source, target, resume=True, layout=ParallelLayout(tp=2)), planned(source, target)):
        with pytest.raises(BadInputError, match="already exists"):
            execute(other)
    save_file({k: v + 1 for k, v in load_file(source / "model.safetensors").items()}, source / "model.safetensors")
    with pytest.raises(BadInputError, match="already exists"):
        execute(planned(source, target, resume=True))


def test_a_receipt_that_cannot_be_written_is_refused_before_any_tensor_is(
    tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    with pytest.raises(BadInputError, match=r"--receipt .*r.json: there is no folder .*nothere; make it"):
        execute(planned(tiny_folder("llama"), target, receipt=tmp_path / "nothere" / "r.json"))
    with pytest.raises(BadInputError, match=r"--receipt .* is a folder"):
        execute(planned(tiny_folder("llama"), target, receipt=tmp_path))
    assert not partial_folder(target).exists()


def test_a_source_file_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(
    tiny_folder: TinyFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tiny_folder("llama"), tmp_path / "target", "hf")
    unreadable, name = plan.copies[0]
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(StorageError, match=rf"{name}: cannot be read: Permission denied"):
        execute(plan)
