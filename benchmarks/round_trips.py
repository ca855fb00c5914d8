"""There and back in every format and layout of a generated list: every tensor bit-identical, every refusal expected.

    python benchmarks/round_trips.py --n 600 --pairs 150 --write

For each tiny model of tests/tiny.py (fp32, and bf16 for every other) the list holds torch_dist with stacked layers and
with layers in the keys, and legacy files with the names of Transformer Engine, of its sequential experts, of local
modules and of the oldest; times tp 1 to 4, pipelines of 1 to 4 stages, virtual stages, uneven ends, and for mixtures
ep 1 to 8 and etp 1 to 4. Of those that are possible --n are written and read back, and --pairs of two are resharded,
one to the other; of the others --refusals are asked for. Which is which follows from the sizes alone, written down in
tests/converters/layout_grid.py: a refusal that nobody expects is a failure, and so is one that does not come.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="how many there-and-back conversions")
    parser.add_argument("--pairs", type=int, default=100, help="how many reshards")
    parser.add_argument("--refusals", type=int, default=300, help="how many impossible layouts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS / 'round_trips.json'}")
    asked = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.path.insert(0, str(ROOT))  # the list and the tiny models stand beside the tests
    import torch

    from tests.converters.layout_grid import FORMATS, Tally, Traveller, expected, ways
    from tests.tiny import TINY, save_tiny

    torch.set_num_threads(1)
    rng, tally = random.Random(asked.seed), Tally()
    by_format = dict.fromkeys(FORMATS, 0)
    listed = 0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        work = Path(scratch) / "work"
        work.mkdir()
        travellers: list[Any] = []
        for number, name in enumerate(TINY):
            dtype = torch.bfloat16 if number % 2 else torch.float32
            travellers.append(Traveller(save_tiny(name, Path(scratch) / name, dtype), work, tally))
        begun = time.monotonic()
        lists = [ways(t.model.config.num_moe_experts is not None) for t in travellers]
        listed = sum(map(len, lists))
        good = [
            [w for w in all_ways if not expected(w, t.model.config)]
            for t, all_ways in zip(travellers, lists, strict=True)
        ]
        for at in range(asked.n):
            traveller, able = travellers[at % len(travellers)], good[at % len(travellers)]
            form = FORMATS[at // len(travellers) % len(FORMATS)]
            way = rng.choice([w for w in able if w.form == form] or able)
            by_format[way.form] += 1
            traveller.there_and_back(way)
        for at in range(asked.refusals):
            traveller, all_ways = travellers[at % len(travellers)], lists[at % len(travellers)]
            traveller.there_and_back(rng.choice([w for w in all_ways if expected(w, traveller.model.config)]))
        for at in range(asked.pairs):
            traveller, able = travellers[at % len(travellers)], good[at % len(travellers)]
            traveller.through(rng.choice(able), rng.choice(able))
        seconds = time.monotonic() - begun
    possible = sum(map(len, good))
    print(f"{len(travellers)} models, {listed} (model, format, layout) in the list, {possible} of them possible")
    print(f"{tally.identical} of {asked.n} there and back bit-identical, {tally.resharded} of {asked.pairs} resharded")
    print("there and back: " + ", ".join(f"{count} {form}" for form, count in by_format.items()))
    print("refused as expected: " + ", ".join(f"{count} {reason}" for reason, count in tally.refused.items()))
    for failure in tally.failures:
        print(f"FAILED {failure[:600]}")
    print(f"{seconds:.0f} s, {len(tally.failures)} failures")
    if asked.write:
        from measuring import provenance, write_result  # it loads torch

        result = {
            **provenance(f"python benchmarks/round_trips.py --n {asked.n} --pairs {asked.pairs} --write"),
            "models": list(TINY),
            "listed": listed,
            "possible": possible,
            "there_and_back": asked.n,
            "bit_identical": tally.identical,
            "by_format": by_format,
            "resharded": asked.pairs,
            "resharded_bit_identical": tally.resharded,
            "refused_as_expected": tally.refused,
            "failures": tally.failures,
            "seconds": round(seconds, 1),
        }
        write_result("round_trips.json", result)
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
