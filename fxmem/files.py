"""Files that are written whole or not at all, and errors with a name where they cannot be."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fxmem.errors import FileError

_FAILURES = (OSError, RuntimeError, SafetensorError)
"""What torch, safetensors and Python raise where a disk is full or a path cannot be opened."""


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write to; it takes the place of ``file`` once it is on the disk.

    Whatever happens inside, ``file`` is the old one or the new one, and nothing else stays.

    Raises:
        FileError: it cannot be written.
    """
    part: Path | None = None
    try:
        # the ending stays: writers of pictures choose the format by it
        handle, name = tempfile.mkstemp(f".part{file.suffix}", f".{file.stem}.", file.parent)
        os.close(handle)
        part = Path(name)
        yield part
        _to_disk(part)
        part.chmod(0o666 & ~_umask())
        part.replace(file)
        with contextlib.suppress(OSError):
            _to_disk(file.parent)
    except _FAILURES as error:
        raise FileError(f"{file} cannot be written: {error}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """The whole of ``file``, as :func:`replacing` does."""
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8")


def folder(path: Path) -> Path:
    """``path`` as a folder that can be written to, made where it is missing.

    Raises:
        FileError: it is a file, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise FileError(f"{path} is no folder to write to: {error}") from error
    return path


def cache_folder() -> Path:
    """``$FXMEM_CACHE``, else ``$XDG_CACHE_HOME/fxmem``, else ``~/.cache/fxmem``; it may not exist.

    Only absolute XDG paths count, as that standard asks.
    """
    own = os.environ.get("FXMEM_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (shared if shared.is_absolute() else Path.home() / ".cache") / "fxmem"


def check_target(file: Path) -> None:
    """Before any work: ``file`` can be written.

    Raises:
        FileError: it is a folder, or its folder is missing or cannot be written to.
    """
    if file.is_dir():
        raise FileError(f"{file} is a folder", advice="name a file")
    if not file.parent.is_dir():
        raise FileError(f"{file.parent} is no folder", advice="make it first")
    folder(file.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["cache_folder", "check_target", "folder", "replacing", "write_text"]
