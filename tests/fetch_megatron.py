"""Fetch megatron-core and Megatron-Bridge, which tests/megatron runs for real: `python tests/fetch_megatron.py`.

Of megatron-core two releases: the newest that is supported, and one that reads nothing but `common.pt`. A wheel asks
for one Python, but its Python files run on 3.11 and 3.12 alike, so it is unzipped, not installed.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One version of a project: the Python that its wheel asks for, and the wheel's SHA-256 for each machine."""

    project: str
    version: str
    python: str
    x86_64: str
    aarch64: str

    @property
    def folder(self) -> Path:
        """What goes on PYTHONPATH."""
        return CACHE / f"{self.project}-{self.version}"


NEWEST = Release(
    project="megatron-core",
    version="0.19.2",
    python="3.12",
    x86_64="8e3e486f13f559450415b9b9dc0ff3331a0bb83dd154553f7f350a75ff9c42b5",
    aarch64="e1717c0cdb7669d2112c3f3d80a2e748d2721b4798044d750cab5a3b2dffe38f",
)
OLDER = Release(
    project="megatron-core",
    version="0.16.1",
    python="3.11",
    x86_64="38f6bef63cd4ebc4c39c1eccbaf578596accba5c47d012faffa0670913aec131",
    aarch64="dab8b9a16bff77f5677e5afbcdb9e4f5c7f794d34dedd2ea9902e4bcc878d417",
)
BRIDGE = Release(
    project="megatron-bridge",
    version="0.6.2",
    python="3.12",
    x86_64="bcb7274ab9327167c345aa24b96b95790ce5090df1945d883bdc41065d5649e2",
    aarch64="bcb7274ab9327167c345aa24b96b95790ce5090df1945d883bdc41065d5649e2",
)
OMEGACONF = Release(  # with which Megatron-Bridge makes objects of a run_config.yaml
    project="omegaconf",
    version="2.4.0",
    python="3.12",
    x86_64="f141a664c777582405e3cc6e0545ecc79429e79f844995b1a6e71c35946a025c",
    aarch64="f141a664c777582405e3cc6e0545ecc79429e79f844995b1a6e71c35946a025c",
)
FOLDER = NEWEST.folder


def fetch_release(release: Release) -> Path:
    """The folder to put on PYTHONPATH; downloads and unzips the wheel when it is not there yet.

    Raises subprocess.CalledProcessError when pip finds no wheel of the version and hash.
    """
    if release.folder.is_dir():
        return release.folder
    machine = "aarch64" if platform.machine() in ("aarch64", "arm64") else "x86_64"
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        partial = Path(name)
        wanted = partial / "wanted.txt"
        wanted.write_text(f"{release.project}=={release.version} --hash=sha256:{getattr(release, machine)}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(partial)]
        platform_tags = [
            "--python-version",
            release.python,
            "--only-binary=:all:",
            "--platform",
            f"manylinux_2_28_{machine}",
        ]
        subprocess.run([*pip, *platform_tags, "--require-hashes", "--requirement", str(wanted)], check=True)
        (wheel,) = partial.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial / "unzipped")
        (partial / "unzipped").rename(release.folder)  # last, so that a folder which exists is whole
    return release.folder


if __name__ == "__main__":
    for each in (NEWEST, OLDER, BRIDGE, OMEGACONF):
        fetch_release(each)
