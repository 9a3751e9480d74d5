"""``python -m atp_utils.runs.publish RUN FOLDER``: copy a profile's complete runs to where results are recorded.

The record is built beside the folder and takes its place when it is whole. Decisions, raw replies (compressed), test
prompts, training logs and manifests are copied; no weights.
"""

import argparse
import gzip
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from atp_utils import resolve, shown
from atp_utils.support import files, folders
from atp_utils.evolution.journal import DECISIONS, REPLIES
from atp_utils.support.manifest import MANIFEST

LOG = "training_log.csv"


def publish(run: Path, target: Path, overwrite: bool = False) -> list[Path]:
    """Publish the complete runs below ``run`` to ``target``; returns the record's files, relative to it.

    Raises FileNotFoundError where there is no complete run, and FileExistsError, with nothing changed, for a ``target``
    that isn't a record of ours, that holds files which weren't published, or, unless ``overwrite``, one that holds runs
    which ``run`` lacks.
    """
    sources = dict(sorted(_sources(run)))
    if not any(name.name == DECISIONS for name in sources):
        raise FileNotFoundError(f"{shown(run)} holds no complete run (evolution/.../{MANIFEST}): nothing was published")
    before = _published(target)
    lost = sorted({str(name.parent) for name in before if name.name == MANIFEST} - {str(n.parent) for n in sources})
    if lost and not overwrite:
        raise FileExistsError(
            f"{shown(target)} holds runs that {shown(run)} lacks ({', '.join(lost[:3])}{', ...' if lost[3:] else ''}): "
            "publish to another folder, or let it be overwritten (--overwrite)"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".publishing-") as scratch:
        built = folders.claim(Path(scratch) / target.name, {"published": shown(run), "files": list(map(str, sources))})
        for name, source in sources.items():
            _copy(source, built / name)
        if target.exists():
            os.replace(target, Path(scratch) / "before")
        os.replace(built, target)
    return list(sources)


def _sources(run: Path) -> Iterator[tuple[Path, Path]]:
    """(name in the record, file) of all that is published."""
    for manifest in folders.below(run / "evolution", MANIFEST):
        for name in (MANIFEST, DECISIONS):
            yield manifest.with_name(name).relative_to(run), manifest.with_name(name)
        yield manifest.with_name(f"{REPLIES}.gz").relative_to(run), manifest.with_name(REPLIES)
    for log in folders.below(run / "adapters", LOG):
        for path in (log, log.with_name(MANIFEST)):
            yield path.relative_to(run), path
    for prompts in folders.below(run / "data", "test.jsonl"):
        yield prompts.relative_to(run), prompts


def _copy(source: Path, target: Path) -> None:
    with files.replacing(target) as temporary:
        if source.name == REPLIES:
            temporary.write_bytes(gzip.compress(source.read_bytes(), mtime=0))
        else:
            shutil.copyfile(source, temporary)


def _published(target: Path) -> list[Path]:
    """Files of the record at ``target``, relative to it; raises FileExistsError where there are others too."""
    held = folders.holds(target, "FOLDER")
    if held is None:
        return []
    there = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} - {folders.MARKER}
    if strange := sorted(there - set(held.get("files", []))):
        raise FileExistsError(
            f"{shown(target)} holds files that were not published ({', '.join(strange[:3])}): move them"
        )
    return [Path(name) for name in held["files"]]


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 where nothing was published."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.runs.publish", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a profile's folder, e.g. runs/laptop")
    parser.add_argument("folder", help="where the record goes, e.g. data/results/laptop")
    parser.add_argument("--overwrite", action="store_true", help="also if the record there holds runs that RUN lacks")
    options = parser.parse_args(arguments)
    try:
        names = publish(resolve(options.run), resolve(options.folder), options.overwrite)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(names)} files in {shown(options.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
