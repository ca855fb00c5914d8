"""config.json of real models as their authors published them: the spellings of transformers 4, whole."""

from __future__ import annotations

from typing import Any

from tests.converters.published_gemma import GEMMA_GRANITE_NEMOTRON, GEMMA_GRANITE_NEMOTRON_PARAMETERS
from tests.converters.published_gpt_oss import GPT_OSS, GPT_OSS_PARAMETERS
from tests.converters.published_latent import LATENT, LATENT_PARAMETERS
from tests.converters.published_llama import LLAMA, LLAMA_PARAMETERS
from tests.converters.published_others import OTHER_PARAMETERS, OTHERS
from tests.converters.published_qwen import QWEN, QWEN_PARAMETERS

PUBLISHED: dict[str, dict[str, Any]] = LATENT | OTHERS | GPT_OSS | GEMMA_GRANITE_NEMOTRON | LLAMA | QWEN
"""By the name of the model on the Hub, without its owner."""

PARAMETERS: dict[str, tuple[float, float]] = (
    LATENT_PARAMETERS
    | OTHER_PARAMETERS
    | GPT_OSS_PARAMETERS
    | GEMMA_GRANITE_NEMOTRON_PARAMETERS
    | LLAMA_PARAMETERS
    | QWEN_PARAMETERS
)
"""(all, active) parameters as the model cards give them."""
