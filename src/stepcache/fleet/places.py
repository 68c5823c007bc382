"""Where results are stored: a folder on this machine, or any address fsspec knows (s3://bucket/folder, gs://, memory://)."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stepcache import files
from stepcache.files import replacing, write_atomically

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""What an address begins with. Any other name is a file or folder here, also one with a colon in it, as in 10:53."""


def place(address: str | os.PathLike[str]) -> Path:
    """A `Path`, or for an address such as s3://bucket/folder universal_pathlib's `UPath`, which has the same methods.

    Raises:
        ImportError: universal_pathlib, or what fsspec needs for this kind of address, is not installed.
        ValueError: fsspec does not know this kind of address.
    """
    text = os.fspath(address)
    for local in ("file://", "local://"):
        text = text.removeprefix(local)
    if not ADDRESS.match(text):
        return Path(text)
    try:
        from upath import UPath
    except ImportError as error:
        raise ImportError(f"{text!r} needs universal_pathlib: pip install 'stepcache[cluster]'.") from error
    found: Any = UPath(text)
    found.fs  # noqa: B018 - asks fsspec for the file system now: what is missing is said before the work
    return found


def is_remote(path: Path) -> bool:
    """Whether a place is reached through fsspec."""
    return not isinstance(path, Path)


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all; folders above it are made."""
    if is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")  # object stores show an object when it is complete
    else:
        write_atomically(path, text)


@contextmanager
def arriving(path: Path) -> Iterator[Path]:
    """A local path to write a file to; it is at `path` afterwards, whole, or not at all if the body raises."""
    if not is_remote(path):
        with replacing(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / path.name
        yield local
        path.parent.mkdir(parents=True, exist_ok=True)
        path.fs.put_file(str(local), path.path)  # type: ignore[attr-defined]


@contextmanager
def at_hand(path: Path) -> Iterator[Path]:
    """The file as a local path, copied for the time being if it lies elsewhere; FileNotFoundError if there is none."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / path.name
        path.fs.get_file(path.path, str(local))  # type: ignore[attr-defined]
        yield local


def copy(source: Path, target: Path) -> None:
    """Copy a file from any place to any other."""
    with at_hand(source) as local, arriving(target) as temporary:
        shutil.copyfile(local, temporary)


def is_there(path: Path) -> bool:
    """Whether there is such a file, also if another machine has just written it."""
    if is_remote(path):
        path.fs.invalidate_cache()  # type: ignore[attr-defined]
    return path.exists()


def files_below(folder: Path, pattern: str) -> list[Path]:
    """Files that match, sorted; what others have just written there is seen."""
    if is_remote(folder):
        folder.fs.invalidate_cache()  # type: ignore[attr-defined]
    return sorted((path for path in folder.glob(pattern) if path.is_file()), key=str)


def below(path: Path, root: Path) -> str:
    """The part of a path under `root`, with slashes."""
    return "/".join(path.parts[len(root.parts) :])


@contextmanager
def alone(path: Path, folder: bool = True) -> Iterator[None]:
    """Keep other processes from writing into a folder, or a file, while the context lasts; not at addresses.

    The system releases the lock when a process dies, however it does.

    Raises:
        BlockingIOError: another process has it.
    """
    if is_remote(path):
        yield
        return
    name = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # as short for every file
    lock = FileLock(path / ".lock" if folder else path.with_name(f".{name}.lock"))
    place = Path(lock.lock_file).parent
    made = [p for p in (place, *place.parents) if not p.exists()]
    place.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(
            f"another run is writing to {str(path)!r}; wait until it has ended, or choose another place."
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # what we made is left only with something in it
            for parent in made:
                parent.rmdir()


def check_writable(folder: Path) -> None:
    """Find out before the work that files can be written in a folder (OSError), without leaving one behind."""
    if not is_remote(folder):
        files.check_writable(folder, folder=True)
        return
    probe = folder / f".stepcache-{secrets.token_hex(8)}"  # others may be finding out the same
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except NotImplementedError as error:  # such as http://, which can only be read
        raise OSError(f"{str(folder)!r} cannot be written: this kind of address is read only.") from error
