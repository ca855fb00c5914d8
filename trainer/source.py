"""The checkpoint that a run starts from: a folder, or a model of the Hub."""

from __future__ import annotations

from pathlib import Path

from ckptbridge.converters.hub.source import local_folder
from ckptbridge.converters.model import Model, open_model
from ckptbridge.trainer.recipe import ModelSection


def open_source(options: ModelSection) -> Model:
    """Open the recipe's model; nothing but headers is read. A Hub id is downloaded, or found in the Hub's cache.

    Raises BadInputError if there is neither such a folder nor such an id, StorageError if the download fails.
    """
    folder = local_folder(str(Path(options.init_from).expanduser()), options.revision)
    return open_model(folder, hf_config=options.hf_config)
