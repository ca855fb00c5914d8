"""Conversions killed with SIGKILL at random moments and continued with --resume: what comes out at the end.

    python benchmarks/kills.py --conversions 20 --write

Every conversion is a process of its own (`python -m ckptbridge ...`) on a random model of --mb megabytes: there and
back, as torch_dist and as legacy files, in turn. A kill comes at a random moment between the first sign of the output
and the end of an undisturbed run, one to three times in one conversion; then --resume is left to finish. The target is
compared with that of the undisturbed run, byte for byte, the receipt included. Between a kill and the next run nothing
may stand under the target's name. A conversion that was over before its kill is not counted.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measuring import RESULTS, provenance, write_random_model, write_result

from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import family_named

MOST_KILLS_A_CONVERSION = 3
LAYOUT = ("--tp", "2", "--pp", "2", "--ep", "2")
ONE_LAYER_MB = 25.6


def small_mixtral(megabytes: float) -> ModelConfig:
    """Many tensors of half a megabyte: a kill falls between them and within them."""
    return ModelConfig(
        num_layers=2 * max(1, round(megabytes / ONE_LAYER_MB / 2)),
        hidden_size=512,
        ffn_hidden_size=1024,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=2000,
        num_moe_experts=8,
        moe_ffn_hidden_size=1024,
    )


@dataclass
class Case:
    """One conversion, again and again: its arguments, and what became of it."""

    name: str
    verb: str
    source: Path
    flags: Sequence[str] = ()
    kills: int = 0
    conversions: int = 0
    identical: int = 0
    late: int = 0
    """Conversions that were over before their kill: these are not counted."""
    seconds: float = 0.0
    whole: dict[str, str] = field(default_factory=dict[str, str])
    """{file: digest} of the undisturbed run's target."""
    defects: list[str] = field(default_factory=list[str])

    def start(self, target: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ckptbridge", self.verb, str(self.source), str(target), "--quiet"]
        return subprocess.Popen([*command, *self.flags, *more], stderr=subprocess.PIPE)

    def finish(self, target: Path, *more: str) -> str:
        """Run to the end; returns what was said if it failed."""
        process = self.start(target, *more)
        _, said = process.communicate()
        return "" if process.returncode == 0 else f"exit {process.returncode}: {said.decode()[-500:]}"


def digests(folder: Path) -> dict[str, str]:
    """{file: digest} of everything below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run_undisturbed(case: Case, root: Path) -> None:
    """What the case's target has to be, and how long it takes to write."""
    target = root / "target"
    process = case.start(target)
    _wait_for(root / "target.partial", process)
    begun = time.monotonic()
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"{case.name}: an undisturbed run failed: {said.decode()}")
    case.seconds = time.monotonic() - begun
    case.whole = digests(target)
    shutil.rmtree(target)


def run_killed(case: Case, root: Path, rng: random.Random) -> bool:
    """One conversion, killed and resumed, and judged; False if it was over before a kill came."""
    target, kills = root / "target", 0
    for attempt in range(rng.randint(1, MOST_KILLS_A_CONVERSION)):
        if not _kill_once(case, target, rng, attempt):
            break
        kills += 1
    if kills == 0:
        case.late += 1
    else:
        said = "" if target.exists() else case.finish(target, "--resume")
        case.conversions, case.kills = case.conversions + 1, case.kills + kills
        left = sorted(path.name for path in root.iterdir())
        found = digests(target) if target.exists() else {}
        # A kill behind the last rename leaves the journal, which says that all is done.
        litter = set(left) - {"target", "target.partial.journal"}
        if said or found != case.whole or litter:
            differing = sorted(n for n in case.whole.keys() | found.keys() if case.whole.get(n) != found.get(n))
            case.defects.append(f"{said or 'another result'}; differing: {differing[:8]}; beside the target: {left}")
        else:
            case.identical += 1
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return kills > 0


def _kill_once(case: Case, target: Path, rng: random.Random, attempt: int) -> bool:
    """Start or resume, kill at a random moment; False when the conversion was over before."""
    process = case.start(target, *(("--resume",) if attempt else ()))
    _wait_for(target.with_name("target.partial.journal"), process)
    time.sleep(rng.uniform(0, case.seconds))
    if process.poll() is not None:
        if process.returncode:
            said = process.stderr.read().decode()[-300:]  # type: ignore[union-attr]
            case.defects.append(f"exit {process.returncode} before the kill: {said}")
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not target.exists()


def _wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversions", type=int, default=20, help="how many that are killed, in all")
    parser.add_argument("--mb", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS / 'kills.json'}")
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(dir=asked.folder) as scratch:
        base = Path(scratch)
        nbytes = write_random_model(family_named("mixtral"), small_mixtral(asked.mb), base / "hf", 40_000_000)
        print(f"Mixtral of {nbytes / 1e6:.0f} MB in bf16", flush=True)
        cases: list[Case] = []
        for ckpt_format in ("torch_dist", "torch"):
            flags = ("--ckpt-format", ckpt_format, *LAYOUT)
            there = Case(f"hf2mcore {ckpt_format}", "hf2mcore", base / "hf", (*flags, "--max-file-size", "20MB"))
            if said := there.finish(base / ckpt_format):
                raise SystemExit(f"{there.name}: {said}")
            back = Case(f"mcore2hf {ckpt_format}", "mcore2hf", base / ckpt_format, ("--max-shard-size", "30MB"))
            cases += [there, back]
        root = base / "root"
        root.mkdir()
        for case in cases:
            run_undisturbed(case, root)
        turn = 0
        while sum(case.conversions for case in cases) < asked.conversions:
            if run_killed(cases[turn % len(cases)], root, rng):
                turn += 1
        for case in cases:
            print(
                f"{case.name}: {case.conversions} conversions of {case.seconds:.2f} s killed {case.kills} times, "
                f"{case.identical} identical results"
            )
            for defect in case.defects:
                print(f"  {defect}")
    if asked.write:
        _write(asked, nbytes, cases)
    sys.exit(any(case.defects for case in cases))


def _write(asked: argparse.Namespace, nbytes: int, cases: list[Case]) -> None:
    told: list[dict[str, Any]] = [
        {
            "case": case.name,
            "flags": list(case.flags),
            "kills": case.kills,
            "conversions": case.conversions,
            "identical_results": case.identical,
            "over_before_the_kill": case.late,
            "seconds_of_an_undisturbed_write": round(case.seconds, 3),
            "defects": case.defects,
        }
        for case in cases
    ]
    result = {
        **provenance(f"python benchmarks/kills.py --conversions {asked.conversions} --mb {asked.mb} --write"),
        "model_nbytes": nbytes,
        "cases": told,
    }
    write_result("kills.json", result)


if __name__ == "__main__":
    main()
