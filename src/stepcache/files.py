"""Files: one atomic writer, one reader, one check of what can be written."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def parse_document(text: str, schema: str, version: int) -> dict[str, Any]:
    """The fields of a JSON document that names its schema and version; ValueError for anything else."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}.") from error
    if not isinstance(data, dict) or data.pop("schema", None) != schema:
        raise ValueError(f'not a {schema} file: it must be a JSON object with "schema": "{schema}".')
    if (found := data.pop("version", None)) != version:
        raise ValueError(
            f"{schema} version {found!r} is unknown; this program reads version {version}: make the file anew."
        )
    return data


def read_text(path: str | os.PathLike[str], kind: str) -> str:
    """A file's text; FileNotFoundError or ValueError with the kind of file that was expected."""
    file: Any = path if hasattr(path, "is_file") else Path(path)  # what lies elsewhere has a Path's methods (`places`)
    if not file.is_file():
        raise FileNotFoundError(f"{kind} file {str(path)!r} does not exist.")
    try:
        return str(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{kind} file {str(path)!r} is not text.") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file or folder whole or not at all: yields a temporary path that takes the place of `path` at the end.

    The temporary lies in the same folder, which is made if need be. Its name is random, so that processes on one
    network folder do not meet, and short, so that it fits wherever the name of `path` does. When the body raises or is
    interrupted, it is removed and `path` is as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        yield temporary
        if temporary.is_dir() and target.is_dir():  # a folder cannot be renamed onto another one
            old = _beside(target)
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".stepcache-{secrets.token_hex(8)}.tmp")


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes whole or not at all, with the permissions a new file gets (umask)."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def check_writable(path: str | os.PathLike[str], folder: bool = False) -> None:
    """Find out before the work that a file (or `folder`: files in a folder) can be written; nothing is left behind.

    Folders that are missing count as writable if the nearest one above them is.

    Raises:
        OSError: it cannot; the sentence says what stands in the way.
    """
    target = Path(path)
    try:
        if not folder and target.is_dir():
            raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file.")
        nearest = target if folder else target.parent
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            raise NotADirectoryError(f"{str(path)!r} cannot be written: {str(nearest)!r} is a file, not a folder.")
        probe = _beside(nearest / "probe")
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(f"{str(path)!r} cannot be written: {error.strerror}.") from error
