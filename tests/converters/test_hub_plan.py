"""A Hub id is planned and inspected without its shards: config.json, the index and headers are all that is fetched."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from ckptbridge.converters.hf_folder import INDEX
from tests.conftest import TinyFolders
from tests.converters.hub_runs import HUB_ID, run, start
from tests.converters.hub_server import HubServer


@pytest.fixture
def source(tiny_folder: TinyFolders, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(tiny_folder("qwen2_moe"), folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_plan_needs_config_and_index_alone(source: Path, tmp_path: Path) -> None:
    with HubServer({HUB_ID: source}) as hub:
        words = ("plan", "hf2mcore", HUB_ID, tmp_path / "out", "--tp", 2, "--json")
        done = run(hub, tmp_path, *words)
        local = run(hub, tmp_path, "plan", "hf2mcore", source, *words[3:])
    assert done.code == 0, done.stderr
    fetched = {name for name, nbytes in hub.sent.items() if nbytes} - {"name", "agent-harnesses"}
    assert fetched == {"config.json", INDEX}
    plan, expected = json.loads(done.stdout), json.loads(local.stdout)
    assert plan["source"] == f"{HUB_ID}@{hub.commit}"
    for key in ("files", "routes", "nbytes", "tensors_in", "tensors_out"):
        assert plan[key] == expected[key]
    assert sorted(plan["other_files"]) == sorted(expected["other_files"])
    assert any(re.search(r"at most \d of \d lie beside the target", note) for note in plan["notes"])
    assert list(tmp_path.glob("out*")) == []


def test_a_plan_of_a_model_that_does_not_tell_its_dtype_reads_headers(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "plan", "hf2mcore", HUB_ID, tmp_path / "out", "--json")
    assert done.code == 0, done.stderr
    shards = list(source.glob("*.safetensors"))
    assert all(0 < hub.sent[shard.name] <= 1 << 16 for shard in shards)


def test_inspect_reads_headers_alone(source: Path, tmp_path: Path) -> None:
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "inspect", HUB_ID, "--json")
        local = run(hub, tmp_path, "inspect", source, "--json")
    assert done.code == 0, done.stderr
    found, expected = json.loads(done.stdout), json.loads(local.stdout)
    for key in ("parameters", "active_parameters", "nbytes", "tensors", "architecture", "config"):
        assert found[key] == expected[key]
    assert found["path"] == f"{HUB_ID}@{hub.commit}"
    shards = list(source.glob("*.safetensors"))
    assert all(0 < hub.sent[shard.name] <= 1 << 16 for shard in shards)


def test_a_header_that_is_no_header_is_refused(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(b"\xff" * 7 + b"\x00" + shard.read_bytes()[8:])
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "out")
    assert done.code == 3
    assert shard.name in done.stderr
    assert "header" in done.stderr
    assert list(tmp_path.glob("out*")) == []


def test_a_shard_that_the_index_names_and_the_model_lacks_is_refused(source: Path, tmp_path: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "plan", "hf2mcore", HUB_ID, tmp_path / "out")
    assert done.code == 3
    assert shard.name in done.stderr


def test_a_hub_that_cannot_be_reached_is_told(source: Path, tmp_path: Path) -> None:
    with HubServer({HUB_ID: source}) as hub:
        pass
    done = run(hub, tmp_path, "plan", "hf2mcore", HUB_ID, tmp_path / "out")
    assert done.code == 4
    assert "the Hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_verb_that_needs_the_whole_model_leaves_it_in_the_cache_for_others(source: Path, tmp_path: Path) -> None:
    shards = [shard.name for shard in source.glob("*.safetensors")]
    shutil.copy(source / shards[0], source / "consolidated.safetensors")  # the same weights again, as some models have
    with HubServer({HUB_ID: source}) as hub:
        done = run(hub, tmp_path, "diff", HUB_ID, HUB_ID)
        assert done.code == 0, done.stderr
        assert hub.sent["consolidated.safetensors"] == 0
        assert all(hub.sent[shard] == (source / shard).stat().st_size for shard in shards)
        hub.sent.clear()
        done = run(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "mcore")
        assert done.code == 0, done.stderr
        assert not any(hub.sent[shard] for shard in shards)
        hub.requests.clear()
        process = start(hub, tmp_path, "hf2mcore", HUB_ID, tmp_path / "offline", HF_HUB_OFFLINE="1")
        assert process.communicate(timeout=120) is not None
        assert process.returncode == 0
        assert hub.requests == []
