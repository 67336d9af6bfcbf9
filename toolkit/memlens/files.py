"""Files that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["replace_files", "replace_text"]


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write all files beside their places, then rename them in order; a file whose bytes are the same is left alone.

    Raises:
        OSError: every old file is whole, and the last one is the last to change.
    """
    parts: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, raw in contents.items():
            whole = folder / name
            if whole.exists() and whole.read_bytes() == raw:
                continue
            part = folder / f".{name}.{os.getpid()}.partial"
            parts[part] = whole
            part.write_bytes(raw)
        for part, whole in parts.items():
            part.replace(whole)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace_files` for one text, in UTF-8.

    Raises:
        OSError: the old file is whole.
    """
    replace_files(path.parent, {path.name: text.encode()})
