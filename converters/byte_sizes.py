"""Bytes as people write them."""

from __future__ import annotations


def size_in_words(nbytes: float) -> str:
    """The unit that the number needs, so that little is not told as 0.00 GB: 900 B, 1.71 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
