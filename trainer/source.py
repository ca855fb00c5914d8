"""The checkpoint that a run starts from: a folder, or a model of the Hub; as a mixture if the recipe wants one."""

from __future__ import annotations

from pathlib import Path

from ckptbridge.converters.hub.source import local_folder
from ckptbridge.converters.model import Model, open_model
from ckptbridge.trainer.recipe import ModelSection
from ckptbridge.trainer.upcycling.prepared import prepared


def open_source(options: ModelSection, work: Path) -> Model:
    """Open the recipe's model; nothing but headers is read. A Hub id is downloaded, or found in the Hub's cache.

    With `upcycle` it is a view over the dense model: whoever loads tensors reads them from its files, and no mixture is
    on disk or held a second time. Only what the section says of texts makes the dense model run, and layers that are
    distilled lie in `work`.
    Raises BadInputError if there is neither such a folder nor such an id, StorageError if the download fails; and what
    `prepared` raises.
    """
    folder = local_folder(str(Path(options.init_from).expanduser()), options.revision)
    model = open_model(folder, hf_config=options.hf_config)
    return model if options.upcycle is None else prepared(model, options.upcycle, work).mixture
