"""What an expert's first product gains when it computes its SwiGLU itself, on a Hopper GPU.

    PYTHONPATH=. python benchmarks/grouped_swiglu.py

For each model: the product with its best knobs and then the kernel of swiglu, against the one that does both. Medians
of CUDA-event times; both take turns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from grouped_products import MODELS, jobs_of, operands_of
from tune import launch, relative_error, seconds_of, short

from ckptbridge.kernels.grouped_config import GroupedConfig, config_for
from ckptbridge.kernels.grouped_hopper_swiglu import launch_swiglu
from ckptbridge.kernels.swiglu import swiglu


def main() -> None:
    device = torch.device("cuda", 0)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    for model in MODELS:
        job = jobs_of(model)[0]
        o = operands_of(job, device)
        known = config_for(job.product, device)
        roles = GroupedConfig(block_rows=128, block_columns=256, num_stages=4, parts=2, engine="gluon")
        h, hidden = torch.empty_like(o.out), o.out.new_empty(job.R, job.width // 2)

        def apart(config: GroupedConfig, job=job, o=o) -> torch.Tensor:
            launch(job, o, config)
            return swiglu(o.out, backend="triton")

        functions = {
            f"{short(config)}, then swiglu": lambda config=config, apart=apart: apart(config)
            for config in dict.fromkeys([known, roles, replace(roles, lead=1)])
        }
        fused = {
            f"both: {short(config)}": lambda config=config, o=o, h=h, hidden=hidden: launch_swiglu(
                o.first, o.second, o.ends_E, h, hidden, config=config
            )
            for config in [roles, replace(roles, lead=1), replace(roles, lead=2), replace(roles, num_stages=3)]
        }
        expected = apart(roles)
        for name, function in fused.items():
            h.fill_(torch.nan)
            hidden.fill_(torch.nan)
            function()
            far = max(relative_error(h, o.out), relative_error(hidden, expected))
            print(f"    {name:64s} differs by {far:.1e}")
        for name, seconds in seconds_of(functions | fused, device, 0.1).items():
            print(
                f"{model.name} {name:64s} {seconds * 1e3:7.3f} ms, {job.flops / seconds / 1e12:.0f} TFLOP/s", flush=True
            )


if __name__ == "__main__":
    main()
