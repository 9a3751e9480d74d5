"""Reading and writing small files: whole or not at all, and errors that name the file and the line."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from atp_utils import shown

Model = TypeVar("Model", bound=BaseModel)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name only if the block succeeds.

    A full disk or a kill in the middle therefore never leaves half a file under a final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{shown(path)} was not written: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[BaseModel]) -> None:
    """Write one JSON object a line, keys in the order of the model's fields (byte-identical for equal rows)."""
    write_text(path, "".join(row.model_dump_json() + "\n" for row in rows))


def read_jsonl(path: Path, model: type[Model]) -> list[Model]:
    """Rows of ``path`` as ``model``; raises ValueError naming the line that is malformed."""
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file; run notebooks/01_generate_data.ipynb first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(model.model_validate_json(line))
        except ValidationError as error:
            raise ValueError(f"{shown(path)}, line {number}: {explain(error)}") from None
    return rows


def read_yaml(path: Path, kind: Any) -> Any:
    """Content of the YAML file ``path`` checked against ``kind``; raises ValueError naming line or field."""
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{shown(path)}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{shown(path)}: {explain(error)}") from None


def read_named(path: Path, model: type[Model], what: str) -> list[Model]:
    """Entries of a YAML list, each with a ``name`` of its own; ``what`` they are is said in the ValueError."""
    entries = read_yaml(path, list[model])
    names = [entry.name for entry in entries]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{shown(path)}: expected {what} with distinct names, got {names}")
    return entries


def explain(error: ValidationError, quoted: bool = True) -> str:
    """One line for a pydantic error: where, what was wrong, and what stood there if it may be ``quoted``."""
    parts = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"])
        got = f" (got {str(detail['input'])[:80]!r})" if quoted else ""
        parts.append(f"{where + ': ' if where else ''}{detail['msg']}{got}")
    return "; ".join(parts)
