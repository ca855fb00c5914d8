"""Hub ids: `org/name` stands wherever a Hugging Face checkpoint is read. Nothing else reaches the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ckptbridge.converters.announced import Announced, is_announced_only, open_announced, tells_dtype
from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.hf_folder import (
    ASSET_NAMES,
    INDEX,
    PICKLE,
    PICKLE_INDEX,
    SINGLE,
    HfFolder,
    by_index,
    read_index,
    read_json,
)
from ckptbridge.converters.model import Model, model_of_folder, open_model
from ckptbridge.converters.safetensors_header import header_nbytes, parse_header
from ckptbridge.converters.tensors import Checkpoint, LazyTensor, Stored

if TYPE_CHECKING:
    from ckptbridge.converters.hub.repository import HubRepository
    from ckptbridge.converters.hub.shards import HubShards

Need = Literal["local", "plan", "headers", "stream", "whole"]
"""What is wanted of a Hub id: `local` takes folders alone; `plan` is content with config.json and the index, `headers`
with the shards' headers; `stream` is for a conversion, which fetches the shards one after the other; `whole` downloads
the model."""

_FIRST_NBYTES = 1 << 16
"""Most headers are there with the first request; those of mixtures take a second."""
_CONNECTIONS = 8


def open_source(
    source: str,
    need: Need = "whole",
    *,
    target: Path | None = None,
    revision: str | None = None,
    hf_config: Path | None = None,
    ignore_config_fields: Iterable[str] = (),
    pass_through: Sequence[str] = (),
) -> Model:
    """Open what `source` names, a folder or a Hub id, fetching no more than is needed; "local": a folder alone.

    With `stream`, shards are going to lie beside `target`. A model that is in the Hub's cache already, or is asked for
    offline, is opened there. Raises BadInputError or NotSupportedError when it cannot be converted, StorageError when
    the network fails.
    """
    path, ignore = Path(source), tuple(ignore_config_fields)
    if path.exists():
        if need == "plan" and is_announced_only(path):
            return model_of_folder(open_announced(path, ignore_config_fields=ignore), ignore, pass_through)
        return open_model(path, hf_config=hf_config, ignore_config_fields=ignore, pass_through=pass_through)
    if need == "local":
        raise BadInputError(f"{source}: no such folder, and Megatron checkpoints are not read from the Hub")
    _check_id(source)
    if need == "whole" or pass_through or _is_offline() or hf_config is not None:
        folder = local_folder(source, revision)
        return open_model(folder, hf_config=hf_config, ignore_config_fields=ignore, pass_through=pass_through)
    from ckptbridge.converters.hub.repository import find_repository

    repository = find_repository(source, revision)
    shards = _shard_names(repository)
    if not all(name.endswith(".safetensors") for name in shards) or _are_cached(repository, shards):
        return open_model(local_folder(source, revision), ignore_config_fields=ignore)
    if need == "plan" and INDEX in repository.files and tells_dtype(read_json(repository.cached_file("config.json"))):
        folder = repository.cached_file(INDEX).parent
        announced = open_announced(folder, ignore_config_fields=ignore, assets=_assets(repository, fetched=False))
        return _with_bound(_named(repository, announced, ignore), repository)
    model = _streamed(repository, shards, target if need == "stream" else None, ignore)
    return _with_bound(model, repository) if need == "plan" else model


def _with_bound(model: Model, repository: HubRepository) -> Model:
    """The model with a note on how much of it lies on the disk while it is converted."""
    from ckptbridge.converters.hub.schedule import held_at_most, steps_for
    from ckptbridge.converters.hub.shards import AHEAD

    sizes = {name: file.size for name, file in repository.files.items()}
    steps = steps_for(model.tensors.values())
    count, nbytes = held_at_most(steps, sizes, AHEAD)
    total = len({name for step in steps for name in step.needs})
    note = (
        f"shards are fetched from the Hub, used and dropped: at most {count} of {total} lie beside the target at a "
        f"time, {nbytes / 1e9:.2f} GB"
    )
    return replace(model, notes=(*model.notes, note))


def _streamed(repository: HubRepository, shards: list[str], target: Path | None, ignore: tuple[str, ...]) -> Model:
    """The model by the headers of its shards, which are going to lie beside the target, if there is one."""
    from ckptbridge.converters.hub.shards import HubShards
    from ckptbridge.converters.ranks import this_rank

    coming = HubShards(repository, target.resolve(), this_rank().rank) if target else None
    tensors = dict(_described(repository, shards, coming.folder if coming else Path(repository.origin)))
    config = read_json(repository.cached_file("config.json"))
    notes: tuple[str, ...] = ()
    if config.get("tie_word_embeddings") and {"lm_head.weight", "model.embed_tokens.weight"} <= tensors.keys():
        if coming is None:
            del tensors["lm_head.weight"]
            notes = ("lm_head.weight beside a tied embedding: it is compared when the model is converted",)
        else:
            _fetch_both_ends(coming, tensors)
    if coming is None:
        stored = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Stored)}
        tensors = {name: Announced(tensor.path, tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    assets = _assets(repository, fetched=coming is not None)
    folder = HfFolder(Path(repository.origin), config, tensors, assets, notes)
    try:
        return _named(repository, folder, ignore, coming)
    except BadInputError:
        if coming is not None:
            coming.remove()
        raise


def _fetch_both_ends(shards: HubShards, tensors: Checkpoint) -> None:
    """Both tensors of a tied pair are there twice only if they are equal, which is found out by reading them."""
    ends = {tensor.path.name for name in _TIED if isinstance(tensor := tensors[name], Stored)}
    try:
        shards.wait(sorted(ends))
    except BaseException:
        shards.stop()
        raise


_TIED = ("lm_head.weight", "model.embed_tokens.weight")


def _named(
    repository: HubRepository, folder: HfFolder, ignore: tuple[str, ...], shards: HubShards | None = None
) -> Model:
    """The model of a folder that is called by its id and commit wherever it is told of."""
    model = model_of_folder(replace(folder, path=Path(repository.origin)), ignore)
    return replace(
        model,
        hf_config_file=repository.cached_file("config.json") if model.hf_config_file else None,
        derivation=f"fetched from the Hub: {repository.origin}",
        remote=shards,
    )


def _described(repository: HubRepository, shards: list[str], folder: Path) -> Checkpoint:
    """All tensors by the shards' headers, as if the shards lay in `folder`."""

    def header(name: str) -> dict[str, Stored]:
        path, size = folder / name, repository.files[name].size
        head = repository.read(name, 0, _FIRST_NBYTES)
        end = 8 + header_nbytes(path, head[:8], size)
        if end > len(head):
            head += repository.read(name, len(head), end)
        return parse_header(path, head[8:end], size)

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        headers: dict[str, dict[str, LazyTensor]] = {
            name: dict(found) for name, found in zip(shards, pool.map(header, shards), strict=True)
        }
    if INDEX not in repository.files:
        return headers[SINGLE]
    index = folder / INDEX
    return by_index(index, read_index(repository.cached_file(INDEX)), headers)


def _shard_names(repository: HubRepository) -> list[str]:
    """The files that hold the weights: safetensors, or pickles where there are no others. Raises BadInputError."""
    for index, single in ((INDEX, SINGLE), (PICKLE_INDEX, PICKLE)):
        if index in repository.files:
            names = sorted(set(read_index(repository.cached_file(index)).values()))
            if missing := [name for name in names if name not in repository.files]:
                raise BadInputError(
                    f"{repository.origin}/{index}: {len(missing)} files that it names are not there, first {missing[0]}"
                )
            return names
        if single in repository.files:
            return [single]
    raise BadInputError(
        f"{repository.origin}: found neither {SINGLE} nor {INDEX}, nor {PICKLE} or its index: no weights that "
        "transformers would load"
    )


def _assets(repository: HubRepository, *, fetched: bool) -> tuple[Path, ...]:
    """The tokenizer and generation files, or for a plan their names alone."""
    names = [name for name in ASSET_NAMES if name in repository.files]
    return tuple(repository.cached_file(name) if fetched else Path(repository.origin) / name for name in names)


def _are_cached(repository: HubRepository, names: list[str]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository.id, name, revision=repository.commit) for name in names)
    return all(isinstance(path, str) for path in found)


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder that `source` names, downloaded first if it is a Hub id.

    Raises BadInputError when there is no such folder or model, StorageError when the network fails.
    """
    path = Path(source)
    if path.exists():
        return path
    _check_id(source)
    from huggingface_hub import hf_hub_download, snapshot_download  # pyright: ignore[reportUnknownVariableType]

    from ckptbridge.converters.hub.repository import find_repository, told

    try:
        if _is_offline():
            with told(source, revision):
                return Path(snapshot_download(source, revision=revision))
        repository = find_repository(source, revision)
        names = ["config.json", INDEX, PICKLE_INDEX, *_shard_names(repository), *ASSET_NAMES]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            files = list(pool.map(repository.cached_file, [name for name in names if name in repository.files]))
        with told(source, revision):  # by the revision's own name, so that it is found offline
            hf_hub_download(source, files[0].name, revision=revision)
        return files[0].parent
    except OSError as error:
        raise StorageError(f"{source}: the download failed: {error}; run again to continue it") from error


def _check_id(source: str) -> None:
    from ckptbridge.converters.hub.repository import HUB_ID

    if not HUB_ID.fullmatch(source):
        raise BadInputError(f"{source}: no such folder, and no Hub id (org/name) either")


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
