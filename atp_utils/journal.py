"""The run folder: replies as they arrive, decisions when they are complete, the manifest last.

    replies.jsonl        one raw reply a line, appended as it arrives: the record that everything derives from
    decisions.parquet    the tidy table, derived
    manifest.json        parameters, versions, counts; written last, so its presence says that the run is whole
    served.json          what servers said of their model, if they answered; written by `engines`
    .atp.json            the folder's marker (`folders`)

Replies are addressed by a digest of the whole request and of the engine's identity. Resuming a run,
re-scoring it with another parser and extending it by a seed are therefore one thing, replay: requests that
were answered before are answered from the file, the others by the engine.
"""

import fcntl
import gzip
import json
import os
import platform
import subprocess
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from atp_utils import ROOT, files, folders, shown
from atp_utils.engine import Reply, Request

REPLIES, DECISIONS, MANIFEST = "replies.jsonl", "decisions.parquet", "manifest.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "openai", "pandas", "pydantic")


class Journal:
    """Append-only store of replies in ``folder``; one process at a time (raises RuntimeError otherwise).

    The folder is one that was claimed (`folders`). A line that a crash cut short is dropped on opening; a damaged line
    elsewhere raises ValueError with its number. Replies that a changed configuration no longer asks for stay in the
    file, unused. ``chats`` holds digests of the different contents that were asked: as many chats as a model has to
    compute.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / REPLIES
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise RuntimeError(f"{shown(self.path)} is in use by another run") from None
        self._replies = read_replies(self.path, repair=True)
        self.used: set[str] = set()
        self.chats: set[bytes] = set()
        self.replayed = self.paid = 0

    def get(self, digest: str) -> Reply | None:
        """The journalled reply to the request of this digest, if there is one."""
        reply = self._replies.get(digest)
        if reply is not None:
            self.used.add(digest)
            self.replayed += 1
        return reply

    def put(self, digest: str, request: Request, reply: Reply) -> None:
        """Append a reply; raises OSError naming the file if it can't be written, earlier ones being kept."""
        entry = {"digest": digest, "key": request.key, **vars(reply)}
        line = (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
        end = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.truncate(self._file, end)
            message = f"{shown(self.path)}: {error.strerror}; the replies before are kept, run again to go on"
            raise OSError(error.errno, message) from error
        self._replies[digest] = reply
        self.used.add(digest)
        self.paid += 1

    def sync(self) -> None:
        """Force what was appended to the disk: called once an engine's batch is complete."""
        if self.paid:
            os.fsync(self._file)

    def finish(self, decisions: pd.DataFrame, settings: dict[str, Any], identity: str, **facts: Any) -> None:
        """Write the decisions, then the manifest with all ``settings`` of the run: only now it counts as complete."""
        write_frame(self.folder / DECISIONS, decisions)
        faults = decisions["fault"].dropna().value_counts()
        counts = {"decisions": len(decisions), "invalid": int((~decisions["valid"]).sum())}
        counts |= {"faults": {name: int(count) for name, count in faults.sort_index().items()}}
        counts |= {
            "replies_used": len(self.used),
            "distinct_chats": len(self.chats),
            "replayed": self.replayed,
            "answered_now": self.paid,
        }
        # For a forced choice on servers this is also how it was answered (see `openai_engine`).
        reasons = Counter(self._replies[digest].finish_reason for digest in self.used)
        facts |= {"counts": counts, "finish_reasons": dict(sorted(reasons.items()))}
        write_manifest(self.folder, made_by(), settings=settings, identity=identity, **facts)

    def close(self) -> None:
        """Release the folder."""
        os.close(self._file)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_replies(path: Path, *, repair: bool = False) -> dict[str, Reply]:
    """Digest -> reply from a journal, plain or ``.gz``; ``repair`` cuts off a torn last line."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if repair and whole < len(content):
        os.truncate(path, whole)
    replies = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            entry = json.loads(line.decode("utf-8", "surrogatepass"))
            digest, _ = entry.pop("digest"), entry.pop("key")
            if entry.get("logprobs") is not None:
                entry["logprobs"] = tuple(entry["logprobs"])
            replies[digest] = Reply(**entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{shown(path)}, line {number}: not a journalled reply ({error})") from None
    return replies


def write_frame(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as parquet, whole or not at all."""
    with files.replacing(path) as temporary:
        frame.to_parquet(temporary, index=False)


def remove_derived(folder: Path) -> None:
    """Remove what follows from the replies: decisions and manifest."""
    for name in (MANIFEST, DECISIONS):
        (folder / name).unlink(missing_ok=True)


def write_manifest(folder: Path, origin: dict[str, Any], **facts: Any) -> None:
    """Write ``manifest.json``: ``facts``, and the ``origin`` of the results (`made_by`, when they were made)."""
    files.write_json(folder / MANIFEST, facts | origin)


def made_by() -> dict[str, Any]:
    """What makes results now: installed packages, machine, commit and the time."""
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "commit": _commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _commit() -> str | None:
    """The commit that the code came from, ``-dirty`` where tracked files differ; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_decisions(folder: Path) -> pd.DataFrame:
    """Decisions of every complete run below ``folder``, one table; incomplete runs are left out."""
    paths = [path.parent / DECISIONS for path in folders.below(Path(folder), MANIFEST)]
    parts = [pd.read_parquet(path) for path in paths if path.is_file()]
    if not parts:
        raise FileNotFoundError(f"{shown(folder)} holds no complete run (a folder with {DECISIONS} and {MANIFEST})")
    return pd.concat(parts, ignore_index=True)
