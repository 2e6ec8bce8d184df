"""Write beside the place, flush, rename: what has its final name is whole, whatever killed the writer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial-"


@contextmanager
def replacing(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Lend a temporary path beside `path`, for a file or a folder; rename it to `path` when the block ends well.

    Args:
        path: The final place.
        overwrite: Replace what is there.

    Raises:
        ValueError: Something is there and `overwrite` is off.
    """
    if not overwrite:
        refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL + path.name)
    _remove(partial)
    try:
        yield partial
        flush(partial)
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
        flush_entry(path.parent)
    finally:
        _remove(partial)


def refuse_existing(path: Path) -> None:
    """Raise ValueError if there is something at `path`."""
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path}: is there already. Give another --output, or --overwrite to replace it.")


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    with replacing(path, overwrite=True) as partial:
        partial.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have a file, or a folder with all its files, reach the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    if path.is_dir():
        flush_entry(path)


def flush_entry(folder: Path) -> None:
    """Make a rename in `folder` last; not every system can open a folder, and those that cannot need not."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
