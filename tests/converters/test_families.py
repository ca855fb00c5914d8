"""Every table against the class that it describes: names and shapes of the weights, fields of the config.

The tiny variants are compared with files that `save_pretrained` wrote, published models at their full size with
the real class on the meta device.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from ckptbridge.converters.errors import BadInputError, NotSupportedError
from ckptbridge.converters.fields import Irrelevant, Must, read_config, write_config
from ckptbridge.converters.hf_folder import read_json
from ckptbridge.converters.mapping import Family
from ckptbridge.converters.model import count_parameters, decoder_tensors, open_model
from ckptbridge.converters.model_config import ModelConfig
from ckptbridge.converters.registry import FAMILIES, family_named, family_of, family_that_expresses
from ckptbridge.converters.tensors import Zeros
from tests.conftest import TinyFolders
from tests.converters.published import PARAMETERS, PUBLISHED
from tests.tiny import TINY

Json = dict[str, Any]


def parse(config: Json) -> ModelConfig:
    return read_config(family_of(config, "test").fields, config, "config.json")


def parsed_or_refused(config: Json) -> ModelConfig | str:
    """The config, or the words in which it is refused."""
    try:
        return parse(config)
    except BadInputError as refused:
        return str(refused)


def config_object(config: Json, **changes: Any) -> Any:
    """What transformers makes of a config.json; a copy, since its classes write into the dictionaries they get."""
    kind = getattr(transformers, config["architectures"][0]).config_class
    return kind(**copy.deepcopy(config | changes))


def table(config: Json) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face name that the family's table gives a model of this config, with its shape."""
    family, parsed = family_of(config, "test"), parse(config)
    made: dict[str, tuple[int, ...]] = {}
    for move in family.moves(parsed):
        for name, shape in zip(move.hf, move.hf_shapes, strict=True):
            assert name not in made or move.expert, f"{name} is named by two rows"
            made[name] = shape
    return made


_STACKS = {
    ".block_sparse_moe.router.weight": ".block_sparse_moe.router.layer.weight",
    ".block_sparse_moe.experts.gate_up_proj": ".block_sparse_moe.input_linear.weight",
    ".block_sparse_moe.experts.down_proj": ".block_sparse_moe.output_linear.weight",
}
"""Granite's names in memory, and in files."""


def saved_names(model: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes as `save_pretrained` writes them: transformers 5 keeps experts fused, files have them apart."""
    like_mixtral = (
        *(transformers.MixtralForCausalLM, transformers.MiniMaxM2ForCausalLM),
        transformers.PhimoeForCausalLM,
    )
    is_mixtral = isinstance(model, like_mixtral)
    block, names = ("block_sparse_moe", "w1 w3 w2") if is_mixtral else ("mlp", "gate_proj up_proj down_proj")
    gate_proj, up_proj, down_proj = names.split()
    made: dict[str, tuple[int, ...]] = {}
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        head, fused, tail = name.partition(".mlp.experts.")
        if isinstance(model, transformers.GptOssForCausalLM | transformers.GraniteMoeForCausalLM):
            fused = ""  # their files hold stacks
            for in_memory, in_file in _STACKS.items():
                name = name.replace(in_memory, in_file)
        if name == "lm_head.weight" and tied:
            continue
        if not fused:
            name = name.replace(".mlp.router.", ".mlp.gate.") if is_mixtral else name
            made[name.replace(".mlp.", f".{block}.")] = tuple(weight.shape)
            continue
        count, rows, columns = weight.shape
        for expert in range(count):
            place = f"{head}.{block}.experts.{expert}"
            if tail == "gate_up_proj":
                made[f"{place}.{gate_proj}.weight"] = made[f"{place}.{up_proj}.weight"] = (rows // 2, columns)
            else:
                made[f"{place}.{down_proj}.weight"] = (rows, columns)
    return made


def further_names(config: Json) -> dict[str, tuple[int, ...]]:
    """The layers that predict further tokens, which the class ignores: its next layers, and what only they have.

    Their copies of the embedding and the output layer are left out. (The index of DeepSeek-V3's files has these names.)
    """
    count, layers, hidden = (
        config.get("num_nextn_predict_layers") or 0,
        config["num_hidden_layers"],
        config["hidden_size"],
    )
    if not count:
        return {}
    with torch.device("meta"):
        longer = getattr(transformers, config["architectures"][0])(
            config_object(config, num_hidden_layers=layers + count)
        )
    made: dict[str, tuple[int, ...]] = {}
    for prefix in (f"model.layers.{layer}." for layer in range(layers, layers + count)):
        made |= {name: shape for name, shape in saved_names(longer).items() if name.startswith(prefix)}
        norms = ("enorm", "hnorm", "shared_head.norm")
        made |= {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
        made[f"{prefix}eh_proj.weight"] = (hidden, 2 * hidden)
    return made


@pytest.mark.parametrize("name", TINY)
def test_the_table_names_exactly_what_the_class_saves(name: str, tiny_folder: TinyFolders) -> None:
    folder = tiny_folder(name)
    saved: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            saved |= {key: tuple(shard.get_slice(key).get_shape()) for key in shard.keys()}  # noqa: SIM118
    assert table(read_json(folder / "config.json")) == saved


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_names_exactly_the_published_model_at_full_size(name: str) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(config_object(config))
    expected = saved_names(model) | further_names(config)
    assert table(config) == expected
    total, active = count_parameters(
        {m.name: Zeros(m.shape, torch.bfloat16) for m in family_of(config, name).moves(parse(config))}, parse(config)
    )
    assert total == sum(torch.Size(shape).numel() for shape in expected.values())
    assert (total, active) == pytest.approx(PARAMETERS[name], rel=0.02)


def test_the_naming_oracle_sees_planted_faults(tiny_folder: TinyFolders) -> None:
    config = read_json(tiny_folder("qwen2_moe") / "config.json")
    family, parsed = family_of(config, "test"), parse(config)
    saved = table(config)
    lost = dataclasses.replace(parsed, num_moe_experts=7)
    assert {n for m in family.moves(lost) for n in m.hf} < set(saved)
    longer = dataclasses.replace(parsed, num_layers=5, moe_layer_freq=1)
    assert {n for m in family.moves(longer) for n in m.hf} > set(saved)
    no_bias = dataclasses.replace(parsed, add_qkv_bias=False)
    assert {n for m in family.moves(no_bias) for n in m.hf} < set(saved)


def all_configs() -> dict[str, Json]:
    """Published configs, and the tiny ones as transformers 5 spells them."""
    configs = dict(PUBLISHED)
    for name, tiny in TINY.items():
        made = getattr(transformers, f"{tiny.hf_class}Config")(
            vocab_size=250,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            **tiny.config,
        ).to_dict()
        configs[f"tiny-{name}"] = made | {"architectures": [f"{tiny.hf_class}ForCausalLM"]}
    return configs


CONFIGS = all_configs()

_BOOKKEEPING = {
    *("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "output_router_logits", "use_mrope"),
    *("cache_implementation", "sliding_window_pattern", "attention_dropout"),
    *("max_window_layers", "mlp_only_layers", "decoder_sparse_step", "auto_map", "input_jitter_noise"),
    "aux_loss_alpha",
}
"""Fields that change no logit; which layers are sparse is compared by names."""


_ROPE = {"rope_type": "default", "rope_theta": 5000000}
MISREAD: dict[str, tuple[Json, Json]] = {
    "gemma-2b": ({"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
    "MiniMax-M2": ({"rope_parameters": _ROPE}, {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}}),
}
"""What transformers 5.17 makes of two published files, and what later versions do: that is how they were trained."""


def meant(name: str, resolved: Json) -> Json:
    """The fields of a published config as its class resolved them, without the mistakes of old transformers."""
    mistaken, right = MISREAD.get(name, ({}, {}))
    return resolved | right if resolved | mistaken == resolved else resolved


def unread(family: Family, kind: Any) -> set[str]:
    """Fields of published files that the table never writes and that the class has none of."""
    rows = (row for row in family.fields if isinstance(row, Irrelevant) or (isinstance(row, Must) and not row.write))
    return {name for row in rows for name in row.hf_names} - set(kind().to_dict())


_SPELLED = {"num_local_experts": "experts"}
"""What a message may call a field that has two spellings."""


def computing(config: Mapping[str, Any]) -> Json:
    """The fields of a transformers config that decide the computation, as its class resolved them."""
    kept = {k: v for k, v in config.items() if k not in _BOOKKEEPING and not (k == "sliding_window" and not v)}
    if isinstance(rope := kept.get("rope_parameters"), dict):
        kept["rope_parameters"] = {k: v for k, v in rope.items() if k != "type"}  # rope_type beside it says the same
    return kept


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_survives_being_written_and_read(name: str) -> None:
    config = CONFIGS[name]
    family, parsed = family_of(config, name), parse(config)
    written = write_config(family.fields, parsed)
    assert read_config(family.fields, written, "written") == parsed


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written_as_it_reads_the_original(name: str) -> None:
    config = CONFIGS[name]
    family = family_of(config, name)
    written = write_config(family.fields, parse(config)) | {"architectures": config["architectures"]}
    published, ours = config_object(config), config_object(written)
    beside = unread(family, type(published))
    resolved = meant(name, computing(published.to_dict()))
    expected = {key: value for key, value in resolved.items() if key not in beside}
    got = computing(ours.to_dict())
    expected["head_dim"] = expected.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    assert got == expected
    assert table(config | written) == table(config)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("tiny")])
def test_a_missing_field_means_what_the_class_assumes(name: str) -> None:
    """Remove one field after another: either it is asked for, or its default is the class's own."""
    config = CONFIGS[name]
    for field in computing(config):
        if field in ("model_type",):
            continue
        shorter = {key: value for key, value in config.items() if key != field}
        got = parsed_or_refused(shorter)
        if isinstance(got, str):
            assert _SPELLED.get(field, field) in got
            continue
        filled = config_object(shorter).to_dict() | {"architectures": config["architectures"]}
        if field == "num_key_value_heads":
            continue  # a wrong count shows in the shapes of k and v; published files of before 2023 lack it
        assert dataclasses.replace(got, max_position_embeddings=1) == dataclasses.replace(
            parse(filled), max_position_embeddings=1
        ), f"without {field}"


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("tiny")])
def test_null_means_what_the_class_makes_of_null(name: str) -> None:
    config = CONFIGS[name]
    for field in computing(config):
        if field in ("model_type", "num_key_value_heads"):
            continue
        try:
            filled = config_object(config, **{field: None}).to_dict()
        except Exception:  # the class refuses null there, in its own words
            continue
        got = parsed_or_refused(config | {field: None})
        if isinstance(got, str):
            assert _SPELLED.get(field, field) in got
            continue
        if any(value is None and config[key] is not None for key, value in filled.items() if key == field):
            continue  # kept as null: the model class would fail on it
        expected = parse(filled | {"architectures": config["architectures"]})
        assert dataclasses.replace(got, max_position_embeddings=1) == dataclasses.replace(
            expected, max_position_embeddings=1
        ), f"{field} null"


def test_the_published_meaning_of_fields() -> None:
    """The handful of fields that a table can get wrong in both directions at once."""
    assert parse(PUBLISHED["Mixtral-8x7B-v0.1"]).moe_router_pre_softmax is False
    assert parse(PUBLISHED["Qwen3-30B-A3B"]).moe_router_pre_softmax is False  # norm_topk_prob
    assert parse(PUBLISHED["Qwen2-57B-A14B"]).moe_router_pre_softmax is True
    assert parse(PUBLISHED["Qwen1.5-MoE-A2.7B"]).moe_shared_expert_gate is True
    assert parse(PUBLISHED["Mistral-7B-v0.1"]).window_size == 4096
    assert parse(PUBLISHED["Mixtral-8x7B-v0.1"]).window_size is None
    assert parse(PUBLISHED["Qwen2.5-7B"]).window_size is None
    assert parse(PUBLISHED["Mixtral-8x7B-v0.1"]).moe_ffn_hidden_size == 14336
    assert parse(PUBLISHED["Qwen3-8B"]).kv_channels == 128
    assert parse(PUBLISHED["Llama-3.2-1B"]).share_embeddings_and_output_weights is True
    assert parse(PUBLISHED["gemma-2b"]).activation_func == "gelu_tanh"
    assert parse(PUBLISHED["MiniMax-M2"]).rotary_percent == 0.5
    assert parse(CONFIGS["tiny-qwen2_moe_sparse"]).moe_layer_freq == (0, 1, 0, 1)
    assert parse(CONFIGS["tiny-qwen3_moe_dense_first"]).moe_layer_freq == (0, 1, 1, 1)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(NotSupportedError) as refused:
        family_of({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "there/config.json")
    for word in ("there/config.json", "BloomForCausalLM", *(family.architecture for family in FAMILIES)):
        assert word in str(refused.value)
    with pytest.raises(NotSupportedError, match="mamba"):
        family_named("mamba")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_family_is_found_from_the_config_alone(name: str) -> None:
    """The class that is chosen for a Megatron checkpoint without config.json computes the same model."""
    config = PUBLISHED[name]
    parsed = parse(config)
    chosen = family_that_expresses(parsed, "args")
    assert read_config(chosen.fields, write_config(chosen.fields, parsed), "made") == parsed
    assert parsed.num_moe_experts is None or chosen is family_of(config, name)


def _says_what_it_was_told(family: Family, config: ModelConfig) -> bool:
    """Whether a class either refuses a config or writes one that reads back the same."""
    try:
        written = write_config(family.fields, config)
    except NotSupportedError:
        return True
    return read_config(family.fields, written, "written") == config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize(
    "change",
    [
        {"ffn_hidden_size": 4 * 14336},
        {"window_size": 128},
        {"add_qkv_bias": True},
        {"qk_layernorm": True},
        {"moe_layer_freq": (0,) + (1,) * 31},
        {"moe_router_pre_softmax": True},
        {"moe_shared_expert_intermediate_size": 512},
        {"moe_shared_expert_intermediate_size": 512, "moe_shared_expert_gate": True},
        {"kv_channels": 96},
        {"num_moe_experts": None, "moe_ffn_hidden_size": None, "moe_aux_loss_coeff": 0.0},
        {"share_embeddings_and_output_weights": True},
    ],
    ids=str,
)
def test_a_class_never_writes_a_config_of_another_model(family: Family, change: Json) -> None:
    base = parse(PUBLISHED["Mixtral-8x7B-v0.1"])
    assert _says_what_it_was_told(family, dataclasses.replace(base, **change))


@pytest.mark.parametrize("name", TINY)
def test_opening_names_every_parameter_once(name: str, tiny_folder: TinyFolders) -> None:
    model = open_model(tiny_folder(name))
    moves = list(model.family.moves(model.config))
    assert [move.name for move in moves] == list(model.tensors)
    assert {move.name: move.shape for move in moves} == {n: t.shape for n, t in model.tensors.items()}
    used = [hf for move in moves for hf in move.hf]
    assert sorted(used) == sorted(model.sources)
    stacked = decoder_tensors(model.tensors, model.config)
    assert sum(t.nbytes for t in stacked.values()) == sum(t.nbytes for t in model.sources.values())
