"""How to train what was upcycled: what published runs of the same method found, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from ckptbridge.converters.upcycling.spec import UpcycleSpec


@dataclass(frozen=True, slots=True)
class Setting:
    """One recommendation: what to set, to what, and who found it."""

    name: str
    value: str
    source: str


_HE = "He et al., arXiv 2410.07524"
_VAVRE = "Vavre et al., arXiv 2412.09952"
_DROP = "Drop-Upcycling, arXiv 2502.19261"
_SPARSE = "Sparse Upcycling, arXiv 2212.05055"
_BTX = "Branch-Train-MiX, arXiv 2403.07816"
_LLAMA_MOE = "LLaMA-MoE, arXiv 2406.16554"
_CMOE = "CMoE, arXiv 2502.04416"
_EXPERTS = "Expert Upcycling, arXiv 2604.19835"

_OPTIMIZER = Setting(
    "optimizer state", "fresh: of a language model the dense optimizer's state brings nothing", _SPARSE
)
_BATCH = Setting("batch", "4M tokens (1024 sequences of 4096): 2M converged slower, 32M worst", _HE)
_NO_Z_LOSS = Setting("router z-loss", "none: 1e-3 had no effect", _HE)

_COPIES = (
    Setting(
        "learning rate, 100B tokens and more",
        "peak 1e-4 to 2e-4, half to all of the pretraining's peak; cosine to 2e-5; better than going on at the minimum",
        _HE,
    ),
    Setting("learning rate, a strong base and less data", "3e-5, cosine to 3e-7, 100 steps of warm-up", _VAVRE),
    _BATCH,
    Setting("load-balancing loss", "1e-2 (1e-3 to 1e-2 are best; without it experts die)", _HE),
    _NO_Z_LOSS,
    _OPTIMIZER,
)
_BY_METHOD: dict[str, tuple[Setting, ...]] = {
    "copy": _COPIES,
    "virtual-group": _COPIES,
    "drop": (
        Setting("learning rate", "2e-4, cosine to 2e-5, 2000 steps of warm-up", _DROP),
        Setting("batch", "4M tokens (1024 sequences of 4096)", _DROP),
        Setting("load-balancing loss", "0.02", _DROP),
        Setting("tokens", "several hundred billion (500B there): what is drawn anew has to be learned again", _DROP),
        _OPTIMIZER,
    ),
    "branch-train-mix": (
        Setting("learning rate", "1e-4", _BTX),
        Setting("batch", "4M tokens", _BTX),
        Setting("load-balancing loss", "0.01", _BTX),
        Setting("tokens", "80B of the mixture, on all experts' domains", _BTX),
        _OPTIMIZER,
    ),
    "split": (
        Setting("tokens", "200B", _LLAMA_MOE),
        _OPTIMIZER,
    ),
    "cmoe": (Setting("tokens", "none needed; the published models were fine-tuned on 2000 samples", _CMOE), _OPTIMIZER),
    "expert-upcycling": (
        Setting("top-k", "as in the source, so that a token costs what it did", _EXPERTS),
        Setting("experts to copy", "those with the largest gradients more often than the others", _EXPERTS),
        _OPTIMIZER,
    ),
}


def recommended_settings(spec: UpcycleSpec) -> tuple[Setting, ...]:
    """What a resolved spec's method was trained with; nothing for methods without a published run."""
    return _BY_METHOD.get(spec.method or "", ())
