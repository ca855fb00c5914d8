"""Hub ids: `org/name` stands wherever a Hugging Face checkpoint is read. Nothing else reaches the network."""

from __future__ import annotations

import re
from pathlib import Path

from ckptbridge.converters.errors import BadInputError, StorageError
from ckptbridge.converters.hf_folder import ASSET_NAMES

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_folder(source: str, revision: str | None = None) -> Path:
    """The folder that `source` names, downloaded first if it is a Hub id.

    Raises BadInputError when there is no such folder or model, StorageError when the network fails.
    """
    path = Path(source)
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(source):
        raise BadInputError(f"{source}: no such folder, and no Hub id (org/name) either")
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["config.json", "*.safetensors", "model.safetensors.index.json", *ASSET_NAMES]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise BadInputError(
            f"{source}: the model is gated; accept its terms on the Hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise BadInputError(f"{source}: no such folder here, and no such model on the Hub") from error
    except LocalEntryNotFoundError as error:
        raise StorageError(f"{source}: no such folder here, and the Hub cannot be reached") from error
    except (HfHubHTTPError, OSError) as error:
        raise StorageError(f"{source}: the download failed: {error}; run again to continue it") from error
