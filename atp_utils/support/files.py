"""Reading and writing small files: whole or not at all, and errors that name the file and the line."""

import contextlib
import hashlib
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from atp_utils import resolve, shown

Model = TypeVar("Model", bound=BaseModel)
# Bytes of a YAML file, which is read by a slow reader: ten times what any of ours has.
LARGEST_YAML = 1 << 17
# Bytes of a name: file systems take 255, and figures and locks add to it.
LONGEST_NAME = 180
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3  # YAML's aliases may nest what a line names to any depth
# What reading YAML raises: its constructors pass on what int, float and datetime make of strange numbers and dates.
_NO_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name only if the block succeeds.

    A full disk or a kill in the middle therefore never leaves half a file under a final name.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        yield (temporary := Path(name))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{shown(path)} was not written: {error.strerror}", str(path)) from error
    finally:
        if temporary:
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


def each_line(path: Path, content: bytes, read: Callable[[bytes], Any]) -> Iterator[tuple[str, Any]]:
    """``(where, what `read` makes of it)`` for each line of ``content`` that isn't blank.

    ``where`` names the file and the line, and so does the ValueError where ``read`` raises.
    """
    name = shown(path)
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            value = read(line)
        except ValidationError as error:
            raise ValueError(f"{where}: {explain(error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from None
        yield where, value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; raises FileNotFoundError, or ValueError naming the file that holds none."""
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{shown(path)} is damaged: {error}") from None


def read_jsonl(path: Path, model: type[Model]) -> list[Model]:
    """Rows of ``path`` as ``model``; raises ValueError naming the line that is malformed."""
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file; run notebooks/01_generate_data.ipynb first")
    return [row for _, row in each_line(path, path.read_bytes(), model.model_validate_json)]


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as parquet, whole or not at all.

    Arrow's own copy of the schema and statistics that nobody asks for would be half of a small table; what pandas
    notes of its types stays.
    """
    table = pa.Table.from_pandas(frame, preserve_index=False)
    lean = {"compression": "zstd", "store_schema": False, "write_statistics": False}
    with replacing(path) as temporary, pq.ParquetWriter(temporary, table.schema, **lean) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(table.schema.metadata)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; a process reads it again only when its size or its time of change is another."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_folder(name: str) -> str:
    """What a model is called in file names, which can't hold a slash; raises ValueError for what no file can be."""
    folder = name.replace("/", "--")
    # Snakemake reads braces as a wildcard, and a command line a dash as an option.
    strange = not folder.isprintable() or folder != folder.strip() or not name.strip(".")
    if strange or re.search(r"^-|[{}]", name) or len(folder.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{name[:LONGEST_NAME]!r} can't name a folder of results: no dash in front, no braces, no control "
            f"characters, no space around it, not only dots, at most {LONGEST_NAME} bytes"
        )
    return folder


class Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return node


def read_yaml(path: Path, kind: Any, quoted: bool = True) -> Any:
    """Content of the YAML file ``path`` checked against ``kind``; raises ValueError naming the file and the key.

    What stands there is ``quoted`` in it unless that is false.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)}: no such file")
    if path.stat().st_size > LARGEST_YAML:
        raise ValueError(f"{shown(path)}: larger than {LARGEST_YAML >> 10} KiB, which is no file of settings or texts")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except _NO_YAML as error:
        raise ValueError(f"{shown(path)}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{shown(path)}: {explain(error, quoted)}") from None


def named_file(what: str, folder: Path, name: str) -> Path:
    """The file ``folder/<name>.yaml``, or ``name`` itself if it ends in .yaml; FileNotFoundError names those there."""
    path = resolve(name if name.endswith(".yaml") else folder / f"{name}.yaml")
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in resolve(folder).glob("*.yaml")))
        raise FileNotFoundError(f"no {what} {name!r} (there are: {known})")
    return path


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
        where = f"{where}: " if where else ""
        got = f" (got {_beginning(detail['input'])!r})" if quoted else ""
        parts.append(f"{where}{detail['msg']}{got}")
    return "; ".join(parts)


def _beginning(value: Any) -> str:
    """The first characters of a value, without writing out all of what may be huge (YAML's aliases)."""
    try:
        return (value if isinstance(value, str) else _SHORT.repr(value))[:80]
    except ValueError:  # a number of more digits than Python writes out
        return f"a huge {type(value).__name__}"
