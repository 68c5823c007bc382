"""Files: one atomic writer, one reader, one check of what can be written."""

from __future__ import annotations

import json
import os
import tempfile
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


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` under a temporary name in the same folder, then rename: a reader never sees half of it."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Find out before the work that a file can be written (OSError), without leaving one behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file.")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".stepcache-"):
        pass
