"""The checkpoint that a run starts from: a folder, or a model of the Hub; as a mixture if the recipe wants one."""

from __future__ import annotations

from pathlib import Path

from ckptbridge.converters.errors import BadInputError
from ckptbridge.converters.formats import detect_format
from ckptbridge.converters.hub.source import local_folder
from ckptbridge.converters.model import Model, open_model
from ckptbridge.trainer.computed import refuse_untrained
from ckptbridge.trainer.recipe import ModelSection
from ckptbridge.trainer.upcycling.prepared import prepared


def open_source(options: ModelSection, work: Path) -> Model:
    """Open the recipe's model; nothing but headers is read. A Hub id is downloaded, or found in the Hub's cache.

    With `upcycle` it is a view over the dense model: whoever loads tensors reads them from its files, and no mixture is
    on disk or held a second time. Only what the section says of texts makes the dense model run, and layers that are
    distilled lie in `work`.
    Raises BadInputError if there is neither such a folder nor such an id, NotSupportedError for a model that training
    does not compute, StorageError if the download fails; and what `source_name` and `prepared` raise.
    """
    folder = local_folder(source_name(options), options.revision)
    model = open_model(folder, hf_config=options.hf_config)
    refuse_untrained(model)
    return model if options.upcycle is None else prepared(model, options.upcycle, work).mixture


def source_name(options: ModelSection) -> str:
    """The folder or the Hub id that a section names.

    Raises BadInputError for a `revision` or an `hf_config` that would have no effect on it.
    """
    path = Path(options.init_from).expanduser()
    if options.revision is not None and path.exists():
        raise BadInputError(
            f"model.revision: {options.revision!r} is a branch, tag or commit of a Hub id, but model.init_from "
            f"{path} is a folder here, of which there is one state; leave revision out, or let init_from be a Hub id"
        )
    given = options.hf_config
    if given is not None:
        if not path.exists() or detect_format(path) == "hf":
            raise BadInputError(
                f"model.hf_config: {given} would not be read: it is for a Megatron-Core checkpoint that does not "
                f"describe itself, and {path} is a Hugging Face model with a config.json of its own; leave hf_config "
                "out, or edit that config.json"
            )
        if not (given / "config.json" if given.is_dir() else given).is_file():
            raise BadInputError(f"model.hf_config: {given}: there is no such config.json, nor a folder with one")
    return str(path)
