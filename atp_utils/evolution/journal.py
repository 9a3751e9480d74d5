"""The run folder: what was asked and answered as it happens, decisions when they are complete, the manifest last.

    replies.jsonl        one line a message, a reply or a tool's result, appended as it arrives: the record that all
                         else derives from
    decisions.parquet    the tidy table, derived
    manifest.json        parameters, versions, counts; written last, so its presence says that the run is whole
    served.json          what servers said of their model, if they answered; written by `engines`
    .atp.json            the folder's marker (`folders`)

Replies are addressed by a digest of the whole request and of the engine's identity. Resuming a run, re-scoring it
with another parser and extending it by a seed are therefore one thing, replay: requests that were answered before are
answered from the file, the others by the engine. A reply's line has all of its request: key, seed, options or sampling,
and the chat's last message. A message's line names the message ``before`` it, so that beginnings which chats share
stand there once.
"""

import contextlib
import hashlib
import json
import lzma
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from atp_utils import shown
from atp_utils.evolution import agreement
from atp_utils.evolution.record import Record, Unpacking, address, place_of
from atp_utils.evolution.requests import Message, Reply, Request
from atp_utils.support import files, folders
from atp_utils.support.manifest import MANIFEST, made_by, read_manifest

REPLIES, DECISIONS = "replies.jsonl", "decisions.parquet"
PACKED = f"{REPLIES}.xz"  # as it is published
UNPACKING = 128 << 20  # bytes; what we pack takes 9 MB, and a file may ask for 4 GB
# What a run is, in its table.
RUN = ["scenario", "model", "condition", "arm", "training_seed"]


def read_record(path: Path, *, repair: bool = False) -> Record:
    """The record in a journal's file, plain or as it is published; ``repair`` cuts off a torn last line.

    Raises ValueError with the number of a line that is damaged, and leaves the file as it is then, or naming a packed
    one that can't be unpacked.
    """
    content, record = path.read_bytes(), Record()
    add = record.add
    if path.suffix == ".xz":
        add = Unpacking(record).add
        try:
            content = lzma.decompress(content, memlimit=UNPACKING)
        except lzma.LZMAError as error:
            raise ValueError(f"{shown(path)} is damaged: {error}") from None
    whole = content.rfind(b"\n") + 1
    for _ in files.each_line(path, content[:whole], add):
        pass
    if repair and whole < len(content):
        os.truncate(path, whole)
    return record


class Journal:
    """Append-only record in ``folder``; one process at a time (raises RuntimeError otherwise).

    The folder is one that was claimed (`folders`). A line that a crash cut short is dropped on opening; a damaged line
    elsewhere raises ValueError with its number. Replies that a changed configuration no longer asks for stay in the
    file, unused. Replies that are ``new``, by their digests, this process has paid for itself: they count as answered
    now. ``chats`` holds digests of the different contents that were asked: as many chats as a model has to compute.
    """

    def __init__(self, folder: Path, new: Iterable[str] = ()):
        self.folder = Path(folder)
        self.path = self.folder / REPLIES
        with contextlib.ExitStack() as opened:
            opened.enter_context(folders.lock(self.folder))
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            opened.callback(os.close, self._file)
            self.record = read_record(self.path, repair=True)
            self._opened = opened.pop_all()
        self.used: set[str] = set()
        self.chats: set[bytes] = set()
        self.new = set(new)
        self.replayed = self.paid = 0

    def find(self, request: Request, identity: str) -> Reply | None:
        """The journalled reply to ``request`` by the engine of this ``identity``, if there is one."""
        self.chats.add(hashlib.sha256(request.content.encode("utf-8", "surrogatepass")).digest())
        reply = self.record.replies.get(request.digest(identity))
        if reply is not None:
            self.used.add(reply.digest)
            if reply.digest in self.new:
                self.new.remove(reply.digest)
                self.paid += 1
            else:
                self.replayed += 1
        return reply

    def put(self, request: Request, identity: str, reply: Reply) -> Reply:
        """Append a reply with its request; returns it with its digest.

        Raises OSError naming the file if it can't be written, the lines before being kept.
        """
        digest, (chat, lines) = request.digest(identity), self._told(request.messages)
        asked = {"key": request.key, "seed": request.seed, "chat": chat, **request.form()}
        self._append(*lines, {**vars(reply), "digest": digest, **asked})
        self.used.add(digest)
        self.paid += 1
        return self.record.replies[digest]

    def result(self, kind: str, asked: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` returns for the text ``asked``, a dictionary as JSON has it: recorded once, then replayed.

        ``kind`` names everything else that it depends on.
        """
        digest = address(kind, asked)
        if digest not in self.record.results:
            self._append({"tool": digest, "kind": kind, "asked": asked, "result": make()})
        return self.record.results[digest]

    def _told(self, messages: Sequence[Message]) -> tuple[str, list[dict[str, Any]]]:
        """The address of a chat's last message, and lines of those that the record doesn't hold."""
        place, lines = "", []
        for message in messages:
            told = {"role": message["role"], "content": message["content"]}
            before, place = place, place_of(place, **told)
            if place not in self.record.messages:
                lines.append({"message": place, "before": before, **told})
        return place, lines

    def _append(self, *entries: dict[str, Any]) -> None:
        lines = [json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") for entry in entries]
        content, end = b"".join(line + b"\n" for line in lines), os.fstat(self._file).st_size
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError as error:
            os.truncate(self._file, end)
            message = f"{shown(self.path)}: {error.strerror}; the replies before are kept, run again to go on"
            raise OSError(error.errno, message) from error
        for line in lines:
            self.record.add(line)

    def sync(self) -> None:
        """Force what was appended to the disk: called once an engine's batch is complete."""
        if self.paid:
            os.fsync(self._file)

    def finish(self, decisions: pd.DataFrame, settings: dict[str, Any], identity: str, **facts: Any) -> None:
        """Write the decisions, then the manifest with all ``settings`` of the run: only now it counts as complete."""
        # An earlier one would vouch for these decisions, should a kill come between.
        (self.folder / MANIFEST).unlink(missing_ok=True)
        files.write_parquet(self.folder / DECISIONS, decisions)
        faults = decisions["fault"].dropna().value_counts()
        valid, mass = decisions["valid"].astype(bool), decisions["mass"].dropna().astype(float)
        used = [self.record.replies[digest] for digest in sorted(self.used)]
        counts = {
            "decisions": len(decisions),
            "valid": int(valid.sum()),
            "invalid": int((~valid).sum()),
            "retried": int((decisions["attempts"] > 1).sum()),
            "cut": sum(reply.finish_reason.removeprefix("sampled:") == "length" for reply in used),
            "faults": {name: int(count) for name, count in faults.sort_index().items()},
            "replies_used": len(used),
            "distinct_chats": len(self.chats),
            "replayed": self.replayed,
            "answered_now": self.paid,
        }
        # For a forced choice on servers this is also how it was answered (see `openai_engine`).
        reasons = Counter(reply.finish_reason for reply in used)
        facts |= {"counts": counts, "finish_reasons": dict(sorted(reasons.items()))}
        facts["tokens"] = {
            "prompts": sum(reply.prompt_tokens for reply in used),
            "replies": sum(reply.completion_tokens for reply in used),
        }
        # The probability of both options together, on which P(deviate) rests; None where nothing was scored.
        known = len(mass) > 0
        facts["mass"] = {"mean": float(mass.mean()), "least": float(mass.min())} if known else None
        files.write_json(self.folder / MANIFEST, {"settings": settings, "identity": identity} | facts | made_by())

    def close(self) -> None:
        """Release the folder."""
        self._opened.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_derived(folder: Path) -> None:
    """Remove what follows from the replies: decisions and manifest."""
    for name in (MANIFEST, DECISIONS):
        (folder / name).unlink(missing_ok=True)


def complete_runs(folder: Path) -> list[Path]:
    """The folders of all complete runs in and below ``folder``, published or not, in order."""
    found = (path.parent for path in folders.below(Path(folder), MANIFEST))
    return [run for run in found if (run / DECISIONS).is_file()]


def record_of(run: Path) -> Record:
    """The record of a run, compressed or not."""
    return read_record(next(path for path in (run / REPLIES, run / PACKED) if path.is_file()))


class Counts(BaseModel, extra="allow"):
    """Of a manifest's counts, those that are read again; old manifests lack some."""

    decisions: int | None = None
    invalid: int | None = None
    faults: dict[str, int] = {}


class Facts(BaseModel, extra="allow"):
    """What a run's manifest has to hold; what else it says lies in ``model_extra``."""

    settings: dict[str, Any]
    identity: str
    counts: Counts
    commit: str | None
    finished: str
    tool_events: list[dict[str, Any]] = []


def facts_of(run: Path) -> Facts:
    """A run's manifest; raises what `files.read_json` does, and ValueError for one that is no evolution's."""
    try:
        return Facts.model_validate(read_manifest(run))
    except ValidationError as error:
        raise ValueError(f"{shown(run / MANIFEST)}: {files.explain(error)}") from None


def read_table(run: Path) -> pd.DataFrame:
    """The decisions of a run; raises ValueError naming a file that is no table of decisions."""
    try:
        columns = pq.read_table(run / DECISIONS)
        columns.validate(full=True)  # text that is no UTF-8 would be noticed by whoever reads it
        table = columns.to_pandas()
        lacking = {*RUN, "item", "round", "valid", "reply"} - set(table.columns)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # the last three: pandas' own notes
        raise ValueError(f"{shown(run / DECISIONS)} is damaged: {error}") from None
    if lacking:
        raise ValueError(f"{shown(run / DECISIONS)}: no table of decisions (columns {', '.join(sorted(lacking))} lack)")
    return table


def read_decisions(folder: Path) -> pd.DataFrame:
    """Decisions of every complete run below ``folder``, one table; incomplete runs are left out.

    A column ``run`` says where a row is from: the run's folder, relative to ``folder``. Raises FileNotFoundError where
    there is none, and ValueError where two are of one policy in one condition (counted twice, its decisions would pass
    for more), or disagree in what must agree (`agreement`).
    """
    parts = {run: read_table(run) for run in complete_runs(folder)}
    if not parts:
        raise FileNotFoundError(f"{shown(folder)} holds no complete run (a folder with {DECISIONS} and {MANIFEST})")
    seen: dict[tuple, Path] = {}
    known = []
    for run, part in parts.items():
        facts = read_manifest(run)
        for scenario, model, condition, *policy in part[RUN].drop_duplicates().itertuples(index=False):
            if (other := seen.setdefault((scenario, model, condition, *policy), run)) != run:
                raise ValueError(f"{shown(other)} and {shown(run)} hold the same run: name one of them")
            known.append((shown(run), (scenario, model), condition, facts))
    agreement.check(known)
    named = (part.assign(run=run.relative_to(folder).as_posix()) for run, part in parts.items())
    return pd.concat(named, ignore_index=True).astype({"run": "string"})


def with_words(decisions: pd.DataFrame, results: Path) -> pd.DataFrame:
    """`read_decisions` of ``results`` with a column ``words``: what was written where the choice was made.

    It is missing for forced choices.
    """
    written = decisions["mass"].isna() & decisions["valid"]
    replies: dict[str, Reply] = {}
    for run in decisions["run"][written].unique():
        replies |= record_of(results / run).replies
    words = decisions["reply"].where(written).map(lambda digest: replies[digest].text, na_action="ignore")
    return decisions.assign(words=words.astype("string"))
