"""Fetch megatron-core, which the tests under tests/megatron run for real: `python tests/fetch_megatron.py`.

Its wheel asks for Python 3.12, but its Python files also run on 3.11, so it is unzipped, not installed.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.19.2"
FOLDER = Path(__file__).parents[1] / ".cache" / f"megatron-core-{VERSION}"


def fetch_megatron() -> Path:
    """The folder to put on PYTHONPATH; downloads and unzips the wheel when it is not there yet."""
    if FOLDER.is_dir():
        return FOLDER
    machine = "aarch64" if platform.machine() in ("aarch64", "arm64") else "x86_64"
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        partial = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(partial)]
        platform_tags = [
            "--python-version",
            "3.12",
            "--only-binary=:all:",
            "--platform",
            f"manylinux_2_28_{machine}",
        ]
        subprocess.run([*pip, *platform_tags, f"megatron-core=={VERSION}"], check=True)
        (wheel,) = partial.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial / "unzipped")
        (partial / "unzipped").rename(FOLDER)  # last, so that a folder which exists is whole
    return FOLDER


if __name__ == "__main__":
    fetch_megatron()
