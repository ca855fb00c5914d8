"""A model is converted while it comes from the Hub, through every fault of a network, with a few shards on disk."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ckptbridge.converters.convert import ConvertOptions, plan_conversion
from ckptbridge.converters.execute import execute, journal_file, partial_folder
from ckptbridge.converters.hf_folder import INDEX
from ckptbridge.converters.model import open_model
from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.conftest import TinyFolders
from tests.converters.fp8_models import fp8_pair
from tests.converters.hub_runs import HUB_ID, assert_same, files_of, run, shards_folder, start, stop_at_byte
from tests.converters.hub_server import HubServer

MOST_SHARDS = 4
"""The one in hand, two fetched ahead, and one that shares a parameter with it."""


@pytest.fixture(scope="module")
def source(tiny_folder: TinyFolders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral in nine shards, with a file of the tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "mixtral"
    shutil.copytree(tiny_folder("mixtral"), folder)
    (folder / "tokenizer.json").write_text('{"tokens": ["a", "b"]}')
    assert len(shards_of(folder)) == 9
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the local folder becomes at TP 2 and EP 2, whose files all hold something of every shard."""
    target = tmp_path_factory.mktemp("expected") / "mcore"
    layout = ParallelLayout(tp=2, ep=2)
    execute(plan_conversion(open_model(source), target, "torch_dist", ConvertOptions(layout=layout)))
    return target


LAYOUT = ("--tp", 2, "--ep", 2)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def assert_nothing_left(target: Path) -> None:
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(target.name + ".")] == []


def test_what_comes_from_the_hub_is_what_the_folder_becomes(source: Path, expected: Path, tmp_path: Path) -> None:
    alive: list[int] = []
    target = tmp_path / "mcore"
    with HubServer({HUB_ID: source}) as hub:
        hub.before_block = lambda name, at: alive.append(len(list(shards_folder(target).rglob("*.safetensors*"))))
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT)
    assert done.code == 0, done.stderr
    assert_same(target, expected)
    assert_nothing_left(target)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert 2 <= max(alive) <= MOST_SHARDS < len(shards_of(source))
    for shard in shards_of(source):
        assert hub.sent[shard.name] <= shard.stat().st_size + (1 << 16)  # its header, then itself: once
    assert json.loads((target / "ckptbridge_receipt.json").read_text())["source"] == f"{HUB_ID}@{hub.commit}"


def test_the_comparison_sees_one_bit_and_one_file(expected: Path, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled"
    shutil.copytree(expected, spoiled)
    file = next(iter(spoiled.rglob("*.distcp")))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError):
        assert_same(spoiled, expected)
    file.unlink()
    with pytest.raises(AssertionError):
        assert_same(spoiled, expected)


@pytest.mark.parametrize(
    ("name", "words", "options"),
    [
        ("qwen2_moe", ("--format", "torch", "--tp", 2, "--pp", 2), {"to": "torch", "layout": {"tp": 2, "pp": 2}}),
        ("llama_tied", ("--dtype", "bf16"), {"dtype": "bfloat16"}),
        ("qwen3_moe", ("--ep", 8, "--max-file-size", "100kB"), {"layout": {"ep": 8}, "max_file_size": 100_000}),
    ],
)
def test_other_formats_layouts_and_dtypes(
    name: str, words: tuple[object, ...], options: dict[str, object], tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    import torch

    chosen = dict(options)
    to = chosen.pop("to", "torch_dist")
    layout = ParallelLayout(**chosen.pop("layout", {}))  # type: ignore[arg-type]
    dtype = getattr(torch, str(chosen.pop("dtype"))) if "dtype" in chosen else None
    plan = plan_conversion(
        open_model(tiny_folder(name)),
        tmp_path / "expected",
        to,  # type: ignore[arg-type]
        ConvertOptions(layout=layout, dtype=dtype, **chosen),  # type: ignore[arg-type]
    )
    execute(plan)
    with HubServer({HUB_ID: tiny_folder(name)}) as hub:
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "mcore", *words)
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "mcore", tmp_path / "expected")


def test_weights_in_fp8_are_dequantised_on_the_way(tiny_folder: TinyFolders, tmp_path: Path) -> None:
    fp8, _ = fp8_pair(tiny_folder("mixtral"), tmp_path / "fp8", files=5)
    execute(plan_conversion(open_model(fp8), tmp_path / "expected", "torch_dist"))
    with HubServer({HUB_ID: fp8}) as hub:
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "mcore")
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "mcore", tmp_path / "expected")


def with_head(folder: Path, target: Path, *, equal: bool) -> Path:
    """A tied model whose files hold the head beside the embedding, in a shard of its own."""
    shutil.copytree(folder, target)
    head = load_file(target / "model.safetensors")["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file({"lm_head.weight": head}, target / "model-00002-of-00002.safetensors", {"format": "pt"})
    (target / "model.safetensors").rename(target / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(load_file(target / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return target


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_is_compared_before_anything_is_written(
    equal: bool, tiny_folder: TinyFolders, tmp_path: Path
) -> None:
    source = with_head(tiny_folder("llama_tied"), tmp_path / "source", equal=equal)
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "mcore")
    assert_nothing_left(tmp_path / "mcore")
    if not equal:
        assert done.code == 3
        assert "lm_head.weight differs" in done.stderr
        return
    assert done.code == 0, done.stderr
    assert "lm_head.weight is a copy" in done.stderr
    execute(plan_conversion(open_model(source), tmp_path / "expected", "torch_dist"))
    assert_same(tmp_path / "mcore", tmp_path / "expected")


def test_two_ranks_fetch_each_its_own_shards(source: Path, tmp_path: Path) -> None:
    options = ConvertOptions(max_file_size=200_000)
    execute(plan_conversion(open_model(source), tmp_path / "expected", "torch_dist", options))
    words = ("hf2mcore", HUB_ID, tmp_path / "mcore", "--max-file-size", "200kB")
    with HubServer({HUB_ID: source}) as hub:
        ranks = [start(hub, tmp_path, *words, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        told = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert_same(tmp_path / "mcore", tmp_path / "expected")
    assert_nothing_left(tmp_path / "mcore")


def test_connections_that_are_cut_anywhere_go_on_from_there(source: Path, expected: Path, tmp_path: Path) -> None:
    with HubServer({HUB_ID: source}) as hub:
        cuts = 0
        for shard in shards_of(source):
            size = shard.stat().st_size
            places = [0, 5, 100, *range(9_000, size, 40_000), size - 1]
            hub.faults.cuts[shard.name] = places
            cuts += len(places)
        hub.faults.refusals = {shards_of(source)[2].name: [503, 500], "name": [502], HUB_ID: [429]}
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "mcore", *LAYOUT)
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "mcore", expected)
    assert cuts > 70
    assert not any(hub.faults.cuts.values()), "every cut was met"
    assert not any(refusals for name, refusals in hub.faults.refusals.items() if name != HUB_ID)
    total = sum(shard.stat().st_size for shard in shards_of(source))
    headers = 2 * len(shards_of(source)) * (1 << 16)  # those that were cut were asked for again
    assert sum(hub.sent[shard.name] for shard in shards_of(source)) <= total + headers


def test_a_server_that_begins_anew_every_time_is_believed_from_there(
    source: Path, expected: Path, tmp_path: Path
) -> None:
    with HubServer({HUB_ID: source}) as hub:
        hub.faults.ignores_ranges = {shard.name for shard in shards_of(source)}
        for shard in shards_of(source)[:3]:
            hub.faults.cuts[shard.name] = [170_000]
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "mcore", *LAYOUT)
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "mcore", expected)


def test_killed_anywhere_and_resumed_it_ends_with_the_same_bytes(source: Path, expected: Path, tmp_path: Path) -> None:
    target = tmp_path / "mcore"
    sizes = {shard.name: shard.stat().st_size for shard in shards_of(source)}
    headers = len(sizes) * (1 << 16)
    with HubServer({HUB_ID: source}) as hub:
        for share in (0.1, 0.3, 0.5):  # of what is left, each time
            begun: list[subprocess.Popen[str]] = []
            before = sum(hub.sent[name] for name in sizes)
            stop_at_byte(hub, headers + int(share * sum(sizes.values())), begun, signal.SIGKILL)
            begun.append(start(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT, "--resume"))
            begun[0].communicate(timeout=120)
            assert begun[0].returncode == -signal.SIGKILL, "the conversion came to its end before it was killed"
            assert not target.exists()
            assert sum(hub.sent[name] for name in sizes) > before
        assert len(list(shards_folder(target).rglob("*.safetensors*"))) <= MOST_SHARDS
        hub.before_block = None
        hub.sent.clear()
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT, "--resume")
    assert done.code == 0, done.stderr
    assert_same(target, expected)
    assert_nothing_left(target)
    again = sum(hub.sent[name] for name in sizes)
    assert again < headers + 0.8 * sum(sizes.values()), "what was converted is not fetched a second time"


def test_interrupted_it_says_how_to_go_on(source: Path, expected: Path, tmp_path: Path) -> None:
    target = tmp_path / "mcore"
    begun: list[subprocess.Popen[str]] = []
    with HubServer({HUB_ID: source}) as hub:
        stop_at_byte(hub, 900_000 + 9 * (1 << 16), begun, signal.SIGINT)
        hub.bytes_per_second = 200_000
        begun.append(start(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT))
        _, stderr = begun[0].communicate(timeout=60)
        assert begun[0].returncode == 130
        assert "--resume" in stderr
        assert "Traceback" not in stderr
        assert partial_folder(target).is_dir()
        assert journal_file(target).is_file()
        hub.before_block, hub.bytes_per_second = None, None
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT, "--resume")
    assert done.code == 0, done.stderr
    assert_same(target, expected)


def test_a_shard_that_an_earlier_run_left_is_checked_before_it_is_used(
    source: Path, expected: Path, tmp_path: Path
) -> None:
    target, names = tmp_path / "mcore", [shard.name for shard in shards_of(source)]
    with HubServer({HUB_ID: source}) as hub:
        folder = shards_folder(target) / f"{hub.commit}-0"
        folder.mkdir(parents=True)
        for name in names[:3]:
            shutil.copy(source / name, folder)
        data = bytearray((folder / names[1]).read_bytes())
        data[-5] ^= 1
        (folder / names[1]).write_bytes(data)
        (folder / f"{names[3]}.part").write_bytes((source / names[3]).read_bytes()[:100_000])
        (folder / f"{names[4]}.part").write_bytes(b"x" * 1_000_000)
        (folder / "model-of-another-size.safetensors").write_bytes(b"old")
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT)
    assert done.code == 0, done.stderr
    assert_same(target, expected)
    header = 1 << 16
    sizes = [(source / name).stat().st_size for name in names]
    assert hub.sent[names[0]] <= header
    assert hub.sent[names[1]] >= sizes[1]
    assert hub.sent[names[2]] <= header
    assert hub.sent[names[3]] <= header + sizes[3] - 100_000


def test_damage_on_the_way_is_found_and_the_shard_fetched_again(source: Path, expected: Path, tmp_path: Path) -> None:
    victim = shards_of(source)[4]
    with HubServer({HUB_ID: source}) as hub:
        hub.faults.flips = {victim.name: [victim.stat().st_size - 9]}
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "mcore", *LAYOUT)
    assert done.code == 0, done.stderr
    assert_same(tmp_path / "mcore", expected)
    assert hub.sent[victim.name] >= 2 * victim.stat().st_size


def test_damage_that_stays_ends_the_conversion(source: Path, tmp_path: Path) -> None:
    victim, target = shards_of(source)[4], tmp_path / "mcore"
    with HubServer({HUB_ID: source}) as hub:
        hub.faults.flips = {victim.name: [victim.stat().st_size - 9] * 9}
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT)
    assert done.code == 4
    assert "damaged twice" in done.stderr
    assert victim.name in done.stderr
    assert not target.exists()


def test_a_connection_that_stays_cut_ends_with_what_was_written_kept(
    source: Path, expected: Path, tmp_path: Path
) -> None:
    victim, target = shards_of(source)[5], tmp_path / "mcore"
    with HubServer({HUB_ID: source}) as hub:
        hub.faults.cuts = {victim.name: [131_072] * 20}
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT)
        assert done.code == 4
        assert f"{victim.name}: the connection was cut at byte 131072" in done.stderr
        assert "--resume" in done.stderr
        assert "Traceback" not in done.stderr
        hub.faults.cuts.clear()
        hub.sent.clear()
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target, *LAYOUT, "--resume")
    assert done.code == 0, done.stderr
    assert_same(target, expected)
    assert hub.sent[shards_of(source)[0].name] <= 1 << 16
    assert hub.sent[victim.name] <= victim.stat().st_size - 131_072 + (1 << 16)


def test_a_disk_without_room_for_the_shards_is_told_before_one_is_fetched(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=1900k tmpfs {disk} && exec "$@"'  # the output has 1.6 MB, three shards 0.5 MB
    prefix = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk here")
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, disk / "mcore", prefix=prefix)
    assert done.code == 4
    assert "shards of the model lie there at a time" in done.stderr
    assert all(hub.sent[shard.name] <= 1 << 16 for shard in shards_of(source))


def test_a_gated_model_needs_a_token_which_no_other_host_sees(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "mcore"
    with HubServer({HUB_ID: source}, gated={HUB_ID}, token="hf_secret") as hub:
        refused = run(hub, tmp_path, "hf2mcore", HUB_ID, target)
        assert refused.code == 3
        assert "is gated" in refused.stderr
        assert "hf auth login" in refused.stderr
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / "token").write_text("hf_secret")
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, target)
    assert done.code == 0, done.stderr
    assert files_of(target)
    assert any(request.startswith("GET cdn") for request in hub.requests)
    assert hub.leaked_tokens == []


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("org/unknown",), 3, "no such model on the Hub"),
        ((HUB_ID, "--revision", "v9"), 3, "no branch, tag or commit 'v9'"),
    ],
)
def test_what_is_not_there_is_told(words: tuple[str, ...], code: int, told: str, source: Path, tmp_path: Path) -> None:
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "hf2mcore", words[0], tmp_path / "mcore", *words[1:])
    assert (done.code, "Traceback" in done.stderr) == (code, False)
    assert told in done.stderr
    assert_nothing_left(tmp_path / "mcore")


@pytest.mark.parametrize("against", ["a checkpoint", "a receipt"])
def test_verify_takes_the_revision_that_is_named(against: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "mcore"
    model = shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with HubServer({HUB_ID: model}) as hub:
        assert run(hub, tmp_path, "hf2mcore", model, target).code == 0
        other = (target, "--tokens", 16) if against == "a checkpoint" else ("--against-receipt", target)
        refused = run(hub, tmp_path, "verify", HUB_ID, *other, "--revision", "v9")
        done = run(hub, tmp_path, "verify", HUB_ID, *other, "--revision", hub.commit)
    assert (refused.code, "no branch, tag or commit 'v9'" in refused.stderr) == (3, True)
    assert done.code == 0, done.stdout + done.stderr
