"""A folder of English text to train on, from three Debian packages with free licences; needs apt-get and dpkg-deb.

    python benchmarks/english_text.py english --pack english.tar.xz

| package | what it is | licence |
|---|---|---|
| dict-gcide | the GNU Collaborative International Dictionary of English: 40 MB | GPL-2 or later |
| jargon-text | the Jargon File, prose about hackers' words, 2 MB | public domain |
| linux-doc-6.1 | the Linux kernel's documentation, technical prose, 21 MB; translations are left out | GPL-2 |

The two books are cut at blank lines into documents of about 32 kB, so that some of them can be held out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("dict-gcide", "jargon-text", "linux-doc-6.1")
DOCUMENT_CHARACTERS = 32_000


def fetch(folder: Path) -> dict[str, str]:
    """Unpack the packages into `folder`; returns their versions."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (file,) = folder.glob(f"{package}_*.deb")
        found[package] = file.name.split("_")[1]
        subprocess.run(["dpkg-deb", "-x", str(file), str(folder / "unpacked")], check=True)
        file.unlink()
    return found


def documents(unpacked: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every document."""
    share = unpacked / "usr" / "share"
    for name, file in (
        ("gcide", share / "dictd" / "gcide.dict.dz"),
        ("jargon", share / "doc" / "jargon-text" / "jargon.txt.gz"),
    ):
        for number, text in enumerate(cut(gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace"))):
            yield f"{name}-{number:05}.txt", text
    root = share / "doc" / "linux-doc-6.1" / "Documentation"
    for file in sorted(root.rglob("*.rst.gz")):
        parts = file.relative_to(root).parts
        if "translations" not in parts:
            text = gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
            yield f"linux-{'-'.join(parts).removesuffix('.rst.gz')}.txt", text


def cut(book: str) -> Iterator[str]:
    """Pieces of about DOCUMENT_CHARACTERS that end where a paragraph does."""
    paragraphs: list[str] = []
    size = 0
    for paragraph in book.split("\n\n"):
        paragraphs.append(paragraph)
        size += len(paragraph)
        if size >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(paragraphs)
            paragraphs, size = [], 0
    if paragraphs:
        yield "\n\n".join(paragraphs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the documents go; it must not exist yet")
    parser.add_argument("--pack", type=Path, help="write the folder into this .tar.xz too")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    count = size = 0
    with tempfile.TemporaryDirectory() as name:
        found = fetch(Path(name))
        for file, text in documents(Path(name) / "unpacked"):
            (options.folder / file).write_text(text, encoding="utf-8")
            count, size = count + 1, size + len(text.encode())
    print(json.dumps({"packages": found, "documents": count, "bytes": size}))
    if options.pack:
        with tarfile.open(options.pack, "w:xz") as archive:
            archive.add(options.folder, arcname=options.folder.name)


if __name__ == "__main__":
    main()
