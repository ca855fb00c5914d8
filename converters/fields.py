"""The fields of config.json and of ModelConfig: one table, read both ways.

Every field of a config.json is mapped, required to hold one value, declared irrelevant, or refused by name:
a field that changes the computation is never ignored. A function without its inverse cannot be written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import fields as model_fields
from typing import Any

from ckptbridge.converters.errors import BadInputError, NotSupportedError, told
from ckptbridge.converters.model_config import ModelConfig

Json = dict[str, Any]
REQUIRED: Any = object()


class FieldRow(ABC):
    """One row: which config.json names it owns, and how they become ModelConfig fields and back."""

    @property
    @abstractmethod
    def hf_names(self) -> tuple[str, ...]:
        """The config.json names that this row reads."""

    @abstractmethod
    def to_mcore(self, hf: Json) -> Json:
        """ModelConfig fields from a config.json. Raises BadInputError or NotSupportedError."""

    @abstractmethod
    def to_hf(self, config: ModelConfig) -> Json:
        """config.json fields from a ModelConfig. Raises NotSupportedError for what HF's class cannot say."""


@dataclass(frozen=True)
class Pair(FieldRow):
    """A field with a name on each side; `spellings` are other names that published files use."""

    hf: str
    mcore: str
    default: Any = REQUIRED
    """What HF's class assumes when the field is missing or null; a function of the whole config.json, or a value."""
    spellings: tuple[str, ...] = ()
    convert: tuple[Callable[[Any], Any], Callable[[Any], Any]] | None = None
    """(to mcore, to HF): both or neither."""
    null_means_none: bool = False
    """A null is a value of its own, not a missing field (Mistral's sliding_window)."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf, *self.spellings)

    def to_mcore(self, hf: Json) -> Json:
        value = next((hf[n] for n in self.hf_names if hf.get(n) is not None), None)
        if value is None and not (self.null_means_none and self.hf in hf):
            if self.default is REQUIRED:
                raise BadInputError(f"config.json: field {self.hf!r} is missing")
            value = self.default(hf) if callable(self.default) else self.default
        return {self.mcore: self.convert[0](value) if self.convert else value}

    def to_hf(self, config: ModelConfig) -> Json:
        value = getattr(config, self.mcore)
        if value is None and self.default is REQUIRED:
            raise NotSupportedError(f"{self.mcore} is None, which this Hugging Face class cannot express")
        return {self.hf: self.convert[1](value) if self.convert else value}


def same(name: str, default: Any = REQUIRED) -> Pair:
    """A field with one name on both sides."""
    return Pair(name, name, default)


@dataclass(frozen=True)
class Must(FieldRow):
    """A config.json field that must hold one value, because anything else is another computation."""

    hf: str
    value: Any
    missing: Any = REQUIRED
    """What HF's class assumes when the field is missing; by default the value itself."""
    write: bool = True

    @property
    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def to_mcore(self, hf: Json) -> Json:
        missing = self.value if self.missing is REQUIRED else self.missing
        found = hf.get(self.hf, missing)
        if found is None:
            found = missing
        if found != self.value:
            raise NotSupportedError(
                f"config.json: {self.hf} is {told(found)}; only {self.value!r} is supported for this family"
            )
        return {}

    def to_hf(self, config: ModelConfig) -> Json:
        return {self.hf: self.value} if self.write else {}


@dataclass(frozen=True)
class Lacks(FieldRow):
    """A ModelConfig field that this HF class cannot express unless it holds this value."""

    mcore: str
    value: Any

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ()

    def to_mcore(self, hf: Json) -> Json:
        return {self.mcore: self.value}

    def to_hf(self, config: ModelConfig) -> Json:
        if getattr(config, self.mcore) != self.value:
            raise NotSupportedError(
                f"{self.mcore} is {getattr(config, self.mcore)!r}, which this Hugging Face class cannot express"
            )
        return {}


@dataclass(frozen=True)
class Irrelevant(FieldRow):
    """config.json fields that no computation of the logits reads."""

    names: tuple[str, ...]

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.names

    def to_mcore(self, hf: Json) -> Json:
        return {}

    def to_hf(self, config: ModelConfig) -> Json:
        return {}


@dataclass(frozen=True)
class SparseLayers(FieldRow):
    """Qwen's choice of MoE layers: `decoder_sparse_step` and `mlp_only_layers`, Megatron's `moe_layer_freq`."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        return ("decoder_sparse_step", "mlp_only_layers")

    def to_mcore(self, hf: Json) -> Json:
        step = hf.get("decoder_sparse_step") or 1
        dense: list[int] = hf.get("mlp_only_layers") or []
        if type(hf["num_hidden_layers"]) is not int or hf["num_hidden_layers"] > 10_000:
            raise BadInputError(f"config.json: num_hidden_layers is {told(hf['num_hidden_layers'])}")
        sparse = tuple(int(i not in dense and (i + 1) % step == 0) for i in range(hf["num_hidden_layers"]))
        return {"moe_layer_freq": 1 if all(sparse) else sparse}

    def to_hf(self, config: ModelConfig) -> Json:
        dense = [i for i in range(config.num_layers) if not config.is_moe_layer(i)]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


IRRELEVANT = Irrelevant(
    (
        *(
            "architectures",
            "model_type",
            "_name_or_path",
            "transformers_version",
            "torch_dtype",
            "dtype",
            "auto_map",
        ),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "pretraining_tp", "output_attentions"),
        *(
            "output_hidden_states",
            "return_dict",
            "is_encoder_decoder",
            "chunk_size_feed_forward",
            "problem_type",
        ),
        *(
            "id2label",
            "label2id",
            "output_router_logits",
            "is_llama_config",
            "transformers.js_config",
            "max_length",
        ),
        *("_attn_implementation", "_attn_implementation_autoset", "unsloth_version", "unsloth_fixed"),
    )
)
"""Bookkeeping that published files carry."""


def read_config(fields: Sequence[FieldRow], hf: Json, where: str, ignore: Iterable[str] = ()) -> ModelConfig:
    """A ModelConfig from a config.json.

    Raises NotSupportedError naming every field that no row knows (null values count as absent),
    BadInputError for a field that is missing or impossible.
    """
    known = {name for row in fields for name in row.hf_names} | set(IRRELEVANT.names) | set(ignore)
    if strange := sorted(name for name, value in hf.items() if name not in known and value is not None):
        listed = ", ".join(f"{name} = {told(hf[name])}"[:100] for name in strange)
        raise NotSupportedError(
            f"{where}: fields that are not understood and may change the computation: {listed}. If they do not, name "
            f"them: " + " ".join(f"--ignore-config-field {name}" for name in strange)
        )
    values: Json = {}
    try:
        for row in fields:
            values.update(row.to_mcore(hf))
        return ModelConfig(**values)
    except BadInputError as error:
        raise type(error)(f"{where}: {error}".replace("config.json: config.json:", "config.json:")) from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise BadInputError(f"{where}: a field has a value of the wrong kind: {error}") from error


def write_config(fields: Sequence[FieldRow], config: ModelConfig) -> Json:
    """The config.json fields of a ModelConfig. Raises NotSupportedError for what the class cannot express."""
    hf: Json = {}
    for row in fields:
        for name, value in row.to_hf(config).items():
            if name in hf and hf[name] != value:
                raise NotSupportedError(
                    f"{name} would be both {hf[name]!r} and {value!r}, which this Hugging Face class cannot express"
                )
            hf[name] = value
    try:
        back = read_config(fields, hf, "the config.json that would be written")
    except BadInputError as error:  # what the class lacks makes the rest impossible
        raise NotSupportedError(str(error)) from error
    for field in model_fields(ModelConfig):
        found, expected = getattr(back, field.name), getattr(config, field.name)
        if found != expected:
            raise NotSupportedError(f"{field.name} is {expected!r}, which this Hugging Face class cannot express")
    return hf
