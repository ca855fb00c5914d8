"""Run legacy cases on four ranks of the real megatron-core, all in one job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckptbridge.converters.parallel_layout import ParallelLayout
from tests.megatron.launch import check_fetched, run_worker


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyLayout:
    """Degrees of parallelism, with the layers of the first and the last pipeline rank where they are uneven."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    first: int | None = None
    last: int | None = None

    def __str__(self) -> str:
        sizes = {name: size for name, size in asdict(self).items() if size is not None}
        return "-".join(f"{n}{s}" for n, s in sizes.items() if s > 1 or n in ("first", "last")) or "tp1"

    def ours(self) -> ParallelLayout:
        """The layout as the converters have it."""
        return ParallelLayout(
            tp=self.tp,
            pp=self.pp,
            vpp=self.vpp,
            ep=self.ep,
            etp=self.etp,
            first_stage_layers=self.first,
            last_stage_layers=self.last,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyCase:
    """Load what lies under `root`/release and compare the logits with `expected`; or, without it, save there.

    A save writes `root`/legacy and `root`/torch_dist, both of iteration 7.
    """

    root: Path
    layout: LegacyLayout
    config: dict[str, Any]
    tokens: Tensor
    expected: Tensor | None = None
    te_names: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LegacyResult:
    """A load tells the largest logit difference and whether every rank's entries stood in its modules' order.

    A save tells the `logits` [batch, length, padded vocabulary] of what it saved.
    """

    seconds: float = 0.0
    max_abs_diff: float | None = None
    in_order: bool = False
    logits: Tensor | None = None


def launch_legacy(cases: Sequence[LegacyCase], folder: Path) -> list[LegacyResult]:
    """Run the cases; returns a result for each. Raises RuntimeError with the last words of a rank that failed."""
    check_fetched()
    jobs: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir(parents=True)
        if case.expected is not None:
            torch.save(case.expected, place / "expected.pt")
        jobs.append(
            {
                "verb": "save" if case.expected is None else "load",
                "root": str(case.root),
                "layout": asdict(case.layout),
                "config": case.config,
                "te_names": case.te_names,
                "token_ids": case.tokens.tolist(),
                "expected": str(place / "expected.pt"),
                "logits": str(place / "logits.pt"),
                "out": str(place / "result.json"),
            }
        )
    # Making the process groups of a layout takes a second, so cases that share one follow each other.
    ordered = sorted(jobs, key=lambda job: json.dumps(job["layout"]))
    done = run_worker("legacy_worker.py", ordered, folder, timeout=800)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-8000:]}")
    results: list[LegacyResult] = []
    for made in jobs:
        told = json.loads(Path(made["out"]).read_text())
        logits = torch.load(made["logits"]) if made["verb"] == "save" else None
        results.append(LegacyResult(**told, logits=logits))
    return results
