"""Megatron-Bridge's `run_config.yaml`, read as Megatron's arguments: what a checkpoint of Bridge says of its model.

Bridge (0.6.2) saves no args. It saves the fields of its model provider, which are those of TransformerConfig and
GPTModel under their own names; of classes it names only paths, and none is imported here.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from ckptbridge.converters.errors import BadInputError, NotSupportedError, StorageError, told

RUN_CONFIG = "run_config.yaml"
_PROVIDERS = (
    "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider",
)
"""Those that compute what their fields say; others have code of their own."""
_LARGEST = 1 << 20
"""Bytes. Bridge writes 20 KB; a megabyte takes PyYAML seconds."""
_DEEPEST = 50
_LONGEST = 4096
"""Characters of a value: of a number that long, reading takes PyYAML time that grows with the square."""
_SILU = "torch.nn.functional.silu"
_SQUARED_RELU = "megatron.core.activations.squared_relu"
_DEFAULTS = {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "add_bias_linear": True}
"""The provider's own, where they are not what most models have."""
_OTHER_NAMES = {
    "num_moe_experts": "num_experts",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}


def args_of_run_config(folder: Path, *, needed: bool = True) -> Namespace | None:
    """The arguments that an iteration's folder tells in run_config.yaml; None where it has none.

    Raises NotSupportedError naming the provider when it is one whose computation its fields do not tell (None is
    returned for it where the answer is not `needed`), BadInputError when the file is no configuration.
    """
    file = folder / RUN_CONFIG
    if not file.is_file():
        return None
    fields = _mapping(_mapping(_plain_yaml(file)).get("model"))
    if not fields:
        raise BadInputError(f"{file}: has no section 'model'")
    provider = fields.get("_target_")
    if provider not in _PROVIDERS:
        if not needed:
            return None
        raise NotSupportedError(
            f"{file}: the model is made by {told(provider)}, of which only the code tells what it computes; known are "
            f"{', '.join(_PROVIDERS)}. Give the model's config.json with --hf-config"
        )
    values: dict[str, Any] = dict(_DEFAULTS)
    values |= {_OTHER_NAMES.get(key, key): value for key, value in fields.items() if not isinstance(value, Mapping)}
    activation = _mapping(fields.get("activation_func")).get("_target_")
    gated = fields.get("gated_linear_unit", False)
    return Namespace(
        **values
        | {
            "group_query_attention": True,
            "swiglu": gated is True and activation == _SILU,
            "squared_relu": activation == _SQUARED_RELU,
            "untie_embeddings_and_output_weights": fields.get("share_embeddings_and_output_weights") is False,
        }
    )


def _mapping(value: Any) -> dict[str, Any]:
    return (
        {str(key): entry for key, entry in cast(Mapping[Any, Any], value).items()} if isinstance(value, Mapping) else {}
    )


def _plain_yaml(file: Path) -> Any:
    """A YAML file of nothing but mappings, lists and scalars: tags and aliases are refused."""
    import yaml  # few checkpoints need it

    try:
        if file.stat().st_size > _LARGEST:
            raise BadInputError(f"{file}: has {file.stat().st_size} bytes; Megatron-Bridge writes some 20000")
        text = file.read_text(encoding="utf-8")
        depth = 0
        for event in cast(Iterator[yaml.Event], yaml.parse(text, Loader=yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise BadInputError(f"{file}: holds an alias, which Megatron-Bridge does not write")
            if getattr(event, "tag", None) is not None:
                raise NotSupportedError(
                    f"{file}: holds the tag {told(getattr(event, 'tag', None))}: it may stand for code"
                )
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST:
                raise BadInputError(f"{file}: holds a value of {len(event.value)} characters")
            if depth > _DEEPEST:
                raise BadInputError(f"{file}: is nested deeper than {_DEEPEST} levels")
        return yaml.safe_load(text)
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadInputError(f"{file}: is no YAML: {str(error)[:300]}") from error
