"""Which family a checkpoint belongs to: by config.json's `architectures`, or by what Megatron's args describe."""

from __future__ import annotations

from typing import Any

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.families.deepseek_v2 import DEEPSEEK_V2
from ckptbridge.converters.families.deepseek_v3 import DEEPSEEK_V3
from ckptbridge.converters.families.gemma import GEMMA
from ckptbridge.converters.families.gemma2 import GEMMA2
from ckptbridge.converters.families.gemma3 import GEMMA3
from ckptbridge.converters.families.glm4_moe import GLM4_MOE
from ckptbridge.converters.families.gpt_oss import GPT_OSS
from ckptbridge.converters.families.granite import GRANITE, GRANITE_MOE
from ckptbridge.converters.families.llama import LLAMA
from ckptbridge.converters.families.minimax_m2 import MINIMAX_M2
from ckptbridge.converters.families.mistral import MISTRAL
from ckptbridge.converters.families.mixtral import MIXTRAL
from ckptbridge.converters.families.nemotron import NEMOTRON
from ckptbridge.converters.families.nemotron_moe import NEMOTRON_MOE
from ckptbridge.converters.families.olmo2 import OLMO2
from ckptbridge.converters.families.olmoe import OLMOE
from ckptbridge.converters.families.phi3 import PHI3
from ckptbridge.converters.families.phimoe import PHIMOE
from ckptbridge.converters.families.qwen2 import QWEN2
from ckptbridge.converters.families.qwen2_moe import QWEN2_MOE
from ckptbridge.converters.families.qwen3 import QWEN3
from ckptbridge.converters.families.qwen3_moe import QWEN3_MOE
from ckptbridge.converters.fields import write_config
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model_config import ModelConfig

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    PHI3,
    OLMO2,
    OLMOE,
    MINIMAX_M2,
    PHIMOE,
    NEMOTRON,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GRANITE,
    GRANITE_MOE,
    GPT_OSS,
    NEMOTRON_MOE,
)
"""In the order in which a Megatron checkpoint without a config.json is tried: the first that can express it wins."""


def family_of(hf_config: dict[str, Any], where: str) -> Family:
    """The family of a config.json. Raises NotSupportedError with the list of known architectures."""
    names: Any = hf_config.get("architectures") or []
    if not isinstance(names, list):
        raise BadInputError(f"{where}: architectures is {told(names)}; expected a list of class names")
    kind = hf_config.get("model_type")
    for family in FAMILIES:
        if any(name in names for name in (family.architecture, *family.spellings)) or (
            not names and kind == family.name
        ):
            return family
    known = ", ".join(f.architecture for f in FAMILIES)
    raise NotSupportedError(
        f"{where}: architectures is {told(names)} and model_type {told(kind)}; known are {known}. "
        "CONTRIBUTING.md tells how to add a family in four steps"
    )


def family_named(name: str, where: str = "") -> Family:
    """The family of this name, which stands in the file `where`. Raises NotSupportedError with the list of names."""
    for family in FAMILIES:
        if family.name == name:
            return family
    place = f"{where}: " if where else ""
    raise NotSupportedError(f"{place}family {told(name)} is not known; known are {', '.join(f.name for f in FAMILIES)}")


def family_that_expresses(config: ModelConfig, where: str) -> Family:
    """The first family whose Hugging Face class can say everything that `config` says.

    Raises NotSupportedError with each family's reason.
    """
    reasons: list[str] = []
    for family in FAMILIES:
        try:
            write_config(family.fields, config)
        except NotSupportedError as error:
            reasons.append(f"  {family.architecture}: {error}")
        else:
            return family
    raise NotSupportedError("\n".join([f"{where}: no known Hugging Face class computes this model", *reasons]))
