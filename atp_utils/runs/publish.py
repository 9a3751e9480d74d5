"""``python -m atp_utils.runs.publish RUN FOLDER``: copy a profile's complete runs to where results are recorded.

The record is built beside the folder and takes its place when it is whole. Decisions, raw replies (compressed),
prompts as far as rescoring reads them, training logs and manifests are copied; no weights: small adapters go to a
folder of their own.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from atp_utils import resolve, shown
from atp_utils.evolution.journal import DECISIONS, PACKED, REPLIES, complete_runs, facts_of, read_table
from atp_utils.evolution.record import pack
from atp_utils.runs import adapters
from atp_utils.runs.adapters import LOG
from atp_utils.support import files, folders
from atp_utils.support.manifest import MANIFEST


def publish(run: Path, target: Path, overwrite: bool = False) -> list[Path]:
    """Publish the complete runs below ``run`` to ``target``; returns the record's files, relative to it.

    Raises FileNotFoundError where there is no complete run, and FileExistsError, with nothing changed, for a ``target``
    that isn't a record of ours, or that holds what this one would lack; with ``overwrite`` it is set aside.
    """
    sources = dict(sorted(_sources(run)))
    if not any(name.name == DECISIONS for name in sources):
        raise FileNotFoundError(f"{shown(run)} holds no complete run (evolution/.../{MANIFEST}): nothing was published")
    folders.holds(target, "FOLDER")
    with folders.rebuilding(target, {"published": shown(run)}) as built:
        held = {path.relative_to(target) for path in target.rglob("*") if path.is_file()} - {Path(folders.MARKER)}
        lost = sorted(map(str, held - set(sources)))
        if lost and not overwrite:
            raise FileExistsError(
                f"{shown(target)} holds what {shown(run)} lacks ({', '.join(lost[:3])}{', ...' if lost[3:] else ''}): "
                "publish to another folder, or let it be set aside (--overwrite)"
            )
        for name, source in sources.items():
            packed = source.name == REPLIES
            content = pack(source, facts_of(source.parent).identity) if packed else source.read_bytes()
            with files.replacing(built / name) as copy:
                copy.write_bytes(content)
    return list(sources)


def _sources(run: Path) -> Iterator[tuple[Path, Path]]:
    """(name in the record, file) of all that is published."""
    for manifest in folders.below(run / "evolution", MANIFEST):
        for name, held in ((MANIFEST, MANIFEST), (DECISIONS, DECISIONS), (PACKED, REPLIES)):
            yield manifest.with_name(name).relative_to(run), manifest.with_name(held)
    trained = folders.below(run / "adapters", MANIFEST)
    logs = (path for manifest in trained for path in (manifest, manifest.with_name(LOG)))
    tests, folded = list(folders.below(run / "data", "test.jsonl")), _held_out(run)
    # Environments of all splits make the folds.
    splits = (split for path in tests if path.parent.name in folded for split in path.parent.glob("*.jsonl"))
    for path in (*logs, *tests, *splits):
        yield path.relative_to(run), path


def _held_out(run: Path) -> set[str]:
    """The scenarios of those runs that play held-out environments."""
    played = [each for each in complete_runs(run / "evolution") if facts_of(each).settings.get("held_out")]
    return {name for each in played for name in read_table(each)["scenario"].unique()}


def main(arguments: list[str] | None = None) -> int:
    """Command line; 2 where nothing was published."""
    parser = argparse.ArgumentParser(prog="python -m atp_utils.runs.publish", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a profile's folder, e.g. runs/laptop")
    parser.add_argument("folder", help="where the record goes, e.g. data/results/quick")
    parser.add_argument("--adapters", default=str(adapters.PUBLISHED), help="where small adapters go")
    parser.add_argument("--overwrite", action="store_true", help="also if the record there holds what RUN lacks")
    options = parser.parse_args(arguments)
    try:
        names = publish(resolve(options.run), resolve(options.folder), options.overwrite)
        weights = adapters.publish(resolve(options.run), Path(options.adapters))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(names)} files in {shown(options.folder)}, {len(weights)} adapters in {options.adapters}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
