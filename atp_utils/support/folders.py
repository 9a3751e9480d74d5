"""Folders that hold results: each carries a marker that says what it holds, and no other folder is written to.

A parameter such as ``out`` can name any folder of a user. One that isn't empty and has no marker isn't ours: it is
refused by name, before work starts. So is one of ours that holds something else, unless ``overwrite`` is true; what it
held is then set aside beside it (``.replaced-NAME-1``), never deleted.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atp_utils import resolve, shown
from atp_utils.support import files

MARKER = ".atp.json"
ASIDE = ".replaced-"


def claim(
    folder: str | Path, what: Mapping[str, Any], *, overwrite: bool = False, append: bool = False, name: str = "out"
) -> Path:
    """``folder`` as an absolute path, made if need be and marked as holding ``what`` (values that JSON has).

    With ``overwrite`` a folder of ours that holds something else is set aside; with ``append`` too it is kept and
    marked anew, for contents that can lie beside each other. Raises FileExistsError for a folder that isn't ours, or
    that holds something else, and NotADirectoryError for a file; ``name`` is the parameter that named it.
    """
    path, what = resolve(folder), json.loads(json.dumps(what))
    held = check(path, what, overwrite=overwrite, name=name)
    if held == what:
        return path
    if held is not None and not overwrite:
        raise _other(path, held, what, name)
    if held is not None and not append:
        set_aside(path)
    files.write_json(path / MARKER, what)
    return path


def check(
    folder: str | Path, what: Mapping[str, Any], *, overwrite: bool = False, name: str = "out"
) -> dict[str, Any] | None:
    """What ``folder`` holds, before work starts; raises as `claim` does, for what is known of the marker by then."""
    path, what = resolve(folder), json.loads(json.dumps(what))
    held = holds(path, name)
    if held is not None and not overwrite and any(held.get(key) != value for key, value in what.items()):
        raise _other(path, {key: held.get(key) for key in what}, what, name)
    return held


def _other(path: Path, held: Mapping[str, Any], what: Mapping[str, Any], name: str) -> FileExistsError:
    return FileExistsError(
        f"{shown(path)} holds something else ({_difference(held, what)}): name another folder by {name}, "
        "or set overwrite to true"
    )


def holds(folder: Path, name: str = "out") -> dict[str, Any] | None:
    """What the marker of ``folder`` says; None for a folder that is empty or not there. Raises as `claim` does."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{shown(folder)} is a file: name a folder by {name}")
    if (folder / MARKER).is_file():
        return read_marker(folder)
    # A kill may leave half a marker under its temporary name, and another process may just have marked the folder.
    passing = (MARKER, f".{Path(MARKER).stem}-")
    if folder.is_dir() and any(not entry.name.startswith(passing) for entry in folder.iterdir()):
        raise FileExistsError(
            f"{shown(folder)} isn't empty and wasn't made by this project (it has no {MARKER}): nothing in it is "
            f"touched; name another folder by {name}"
        )
    return None


def read_marker(folder: Path) -> dict[str, Any]:
    """The marker of a folder of ours; raises ValueError where it is damaged."""
    try:
        return dict(json.loads((folder / MARKER).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shown(folder / MARKER)} is damaged ({error}): name another folder") from None


def set_aside(folder: Path) -> Path:
    """Rename ``folder`` to the first free ``.replaced-NAME-N`` beside it; returns the new path."""
    number = 1
    while (target := folder.with_name(f"{ASIDE}{folder.name}-{number}")).exists():
        number += 1
    return folder.rename(target)


def below(folder: Path, name: str) -> Iterator[Path]:
    """Files called ``name`` below ``folder``, sorted; none in a hidden folder, which is unfinished or set aside."""
    for path in sorted(folder.rglob(name)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1]):
            yield path


def _difference(held: Mapping[str, Any], what: Mapping[str, Any]) -> str:
    """``name: held, asked`` for what differs between two markers, nested mappings looked into; at most three."""
    parts = list(_differing(held, what, ""))
    return "; ".join(parts[:3]) + ("; ..." if len(parts) > 3 else "")


def _differing(held: Any, what: Any, name: str) -> Iterator[str]:
    if isinstance(held, dict) and isinstance(what, dict):
        for key in [*what, *(key for key in held if key not in what)]:
            if held.get(key) != what.get(key):
                yield from _differing(held.get(key), what.get(key), f"{name}.{key}" if name else key)
    else:
        yield f"{name}: {str(held)[:60]!r}, asked {str(what)[:60]!r}"
