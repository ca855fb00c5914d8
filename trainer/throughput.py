"""How fast a run is: model FLOPs a second, and what part that is of the most the device could do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckptbridge.trainer.decoder import Decoder
from ckptbridge.trainer.flops import step_flops

_PEAK_BF16 = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A40": 150e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 products with fp32 sums, operations a second, as the vendor's data sheets say (without sparsity)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """What one step of a run costs, and what its device can do."""

    tokens: int
    """Tokens a step."""
    flops: float
    """Model FLOPs a step."""
    device: torch.device
    peak: float | None
    """Operations a second that the device's vendor names; None where it is not known."""

    def record(self, seconds: float) -> dict[str, float]:
        """Fields of the log for a step that took so long: on a CPU tokens a second alone."""
        told = {"tokens_per_s": round(self.tokens / seconds, 1), "step_ms": round(seconds * 1000, 1)}
        if self.device.type != "cuda":
            return told
        told["tflops"] = round(self.flops / seconds / 1e12, 1)
        if self.peak is not None:
            told["mfu"] = round(self.flops / seconds / self.peak, 4)
        return told


def throughput_of(decoder: Decoder, length: int, sequences: int) -> Throughput:
    """The throughput of a run with so many sequences of `length` tokens a step."""
    device, tokens = decoder.output_weight_VH.device, sequences * length
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    return Throughput(
        tokens=tokens,
        flops=step_flops(shapes, decoder.config, length, tokens),
        device=device,
        peak=peak_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None,
    )


def peak_rate(device_name: str) -> float | None:
    """The bf16 rate of a device by the name that torch gives it; None if it is not in the table.

    The longest name in the table that is made of words of the device's decides: "NVIDIA H100 NVL" is no plain H100.
    """
    words = device_name.replace("-", " ").split()
    found = [known for known in _PEAK_BF16 if all(word in words for word in known.split())]
    return _PEAK_BF16[max(found, key=len)] if found else None
