"""The peer of upcycling.py: Megatron-Core's own `upcycle_state_dict`, on the CPU, in a process of its own.

    PYTHONPATH=.cache/megatron-core-0.19.2 python benchmarks/megatron_upcycling.py JOB.json

JOB.json: {"dense": iteration folder of a torch_dist checkpoint, "dense_config", "mixture_config": as
trainer/megatron/config.py makes them, "token_ids": [[...], ...], "vocab_size"}. Prints one line of JSON: for each text
the dense model's loss, the mixture's, and the largest difference of their logits.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict
from torch.nn import functional as F

from ckptbridge.trainer.megatron import model, on_cpu
from ckptbridge.trainer.megatron.worker import load

_ONE_RANK = {"tp": 1, "pp": 1, "ep": 1, "etp": 1}


def main(job_file: Path) -> None:
    """Upcycle as Megatron-Core does, and compare."""
    job = json.loads(job_file.read_text())
    torch.set_grad_enabled(False)
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", store=dist.FileStore(store.name, 1), rank=0, world_size=1)
        on_cpu.patch()
        with on_cpu.OnCpu():
            model.use_layout(**_ONE_RANK)
            dense = model.build(job["dense_config"], local_names=False, **_ONE_RANK)
            keys = load(dense, job["dense"])
            if keys["absent"]:
                raise SystemExit(f"{job['dense']}: Megatron does not find {keys['absent'][:4]}")
            torch.manual_seed(0)
            mixture = model.build(job["mixture_config"], local_names=False, **_ONE_RANK)
            mixture.load_state_dict(upcycle_state_dict([mixture], [dense])["model"])
            rows = [_compared(dense, mixture, ids, job["vocab_size"]) for ids in job["token_ids"]]
        dist.destroy_process_group()
    print(json.dumps(rows))


def _compared(
    dense: model.GPTModel, mixture: model.GPTModel, token_ids: list[int], vocab_size: int
) -> dict[str, float]:
    tokens = torch.tensor([token_ids])
    made = [model.logits(one, tokens) for one in (dense, mixture)]
    a, b = (logits[0, :, :vocab_size].float() for logits in made if logits is not None)
    losses = [F.cross_entropy(logits[:-1], tokens[0, 1:]).item() for logits in (a, b)]
    return {"dense_loss": losses[0], "mixture_loss": losses[1], "max_abs_logit_difference": (a - b).abs().max().item()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
