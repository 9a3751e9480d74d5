"""Folders that hold results: each carries a marker that says what it holds, and no other folder is written to.

A parameter such as ``out`` can name any folder of a user. One that isn't empty and has no marker isn't ours: it is
refused by name, before work starts. So is one of ours that holds something else, unless ``overwrite`` is true; what it
held is then set aside beside it (``.replaced-NAME-1``), never deleted. One process works in a folder at a time.
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import AcquireReturnProxy, FileLock, Timeout

from atp_utils import resolve, shown
from atp_utils.support import files

MARKER = ".atp.json"
ASIDE = ".replaced-"
LOCK = ".lock"


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


def _other(path: Path, held: dict[str, Any], what: dict[str, Any], name: str) -> FileExistsError:
    # Nested values by their path, such as parameters.seed.
    before, now = (pd.json_normalize(marker).to_dict("records")[0] for marker in (held, what))
    differing = [
        f"{key}: {str(before.get(key))[:60]!r}, asked {str(now.get(key))[:60]!r}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]
    said = "; ".join(differing[:3]) + ("; ..." if len(differing) > 3 else "")
    return FileExistsError(
        f"{shown(path)} holds something else ({said}): name another folder by {name}, or set overwrite to true"
    )


def holds(folder: Path, name: str = "out") -> dict[str, Any] | None:
    """What the marker of ``folder`` says; None for a folder that is empty or not there. Raises as `claim` does."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{shown(folder)} is a file: name a folder by {name}")
    if (marker := folder / MARKER).is_file():
        return files.read_json(marker)
    # A kill may leave half a marker under its temporary name, and another process may just have marked the folder.
    passing = (MARKER, f".{Path(MARKER).stem}-", LOCK)
    if folder.is_dir() and any(not entry.name.startswith(passing) for entry in folder.iterdir()):
        raise FileExistsError(
            f"{shown(folder)} isn't empty and wasn't made by this project (it has no {MARKER}): nothing in it is "
            f"touched; name another folder by {name}"
        )
    return None


def lock(folder: Path) -> AcquireReturnProxy:
    """Hold ``folder``, made if need be, for a ``with`` or until the process ends, however it ends.

    Raises RuntimeError where it is held already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / LOCK, blocking=False).acquire()
    except Timeout:
        raise RuntimeError(f"{shown(folder)} is in use by another run") from None


@contextlib.contextmanager
def rebuilding(target: Path, what: Mapping[str, Any]) -> Iterator[Path]:
    """Yield an empty folder that holds ``what`` and takes the place of ``target`` once the block succeeds.

    What ``target`` held is then removed, or set aside if any file of it has no successor. A kill between leaves it
    beside its place, where the next call for this ``target`` takes it from. Raises RuntimeError where another is at it.
    """
    scratch = target.with_name(f".rebuilding-{target.name}")
    built, before = scratch / "new", scratch / "before"
    with lock(scratch):
        _put_back(before, target)
        for left_by_a_kill in (built, before):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        try:
            yield claim(built, what)
            if _files(target) - _files(built):
                set_aside(target)
            elif target.exists():
                target.replace(before)
            built.replace(target)
        finally:
            _put_back(before, target)
            shutil.rmtree(scratch)


def _put_back(before: Path, target: Path) -> None:
    if before.exists() and not target.exists():
        before.replace(target)


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def set_aside(folder: Path) -> None:
    """Rename ``folder`` to the first free ``.replaced-NAME-N`` beside it."""
    names = (folder.with_name(f"{ASIDE}{folder.name}-{number}") for number in itertools.count(1))
    folder.rename(next(name for name in names if not name.exists()))


def below(folder: Path, name: str) -> Iterator[Path]:
    """Files called ``name`` below ``folder``, sorted; none in a hidden folder, which is unfinished or set aside."""
    for path in sorted(folder.rglob(name)):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1]):
            yield path
