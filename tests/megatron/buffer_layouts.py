"""Flat buffers of random parameters, laid out by megatron-core itself: `buffer_layouts.py COUNT` prints JSON."""

from __future__ import annotations

import json
import random
import sys
from types import SimpleNamespace

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

NUMELS = (1, 16, 48, 64, 70, 100, 128, 129, 192, 4096)


def layout(rng: random.Random) -> dict[str, object]:
    """Parameters, a bucket size, and where each parameter begins once the padding of buckets' ends is left out."""
    drawn = [(rng.choice((*NUMELS, rng.randint(1, 5000))), rng.random() < 0.15) for _ in range(rng.randint(1, 12))]
    parameters: list[torch.nn.Parameter] = []
    for numel, shared in drawn:
        parameters.append(torch.nn.Parameter(torch.empty(numel)))
        parameters[-1].shared_embedding = shared
    size = rng.choice((None, 1, 64, 200, 1000, 5000))
    ranks = rng.choice((1, 2, 3, 8, 64))
    options = SimpleNamespace(pad_buckets_for_high_nccl_busbw=rng.random() < 0.3)
    made = DistributedOptimizer._compute_per_buffer_param_layout(parameters, size, ranks, options)
    starts: list[int] = []
    for parameter in parameters:
        start, _, bucket = made.param_index_map[parameter]
        starts.append(sum(made.per_bucket_numel_unpadded[:bucket]) + start - made.bucket_indices[bucket][0])
    return {
        "parameters": drawn,
        "bucket_size": size,
        "starts": starts,
        "total": sum(made.per_bucket_numel_unpadded),
    }


if __name__ == "__main__":
    random_numbers = random.Random(1)
    sys.stdout.write("\n" + json.dumps([layout(random_numbers) for _ in range(int(sys.argv[1]))]))
