import json
import lzma
import resource
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest

from atp_utils.evolution import journal
from atp_utils.evolution.decisions import Decision, to_frame
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.record import pack
from atp_utils.evolution.requests import Reply, Request, Sampling

CHAT = ({"role": "system", "content": "é"}, {"role": "user", "content": "? \ud800"})
REQUEST = Request("a/round1", CHAT, 1)
OTHER = Request("a/round2", (*CHAT, {"role": "assistant", "content": "x"}), 2, ("a", "b"))
REPLY = Reply("ünï\ud800code\n", 3, 4, "stop", (-0.5, float("-inf")))


def put(record, request=REQUEST):
    return record.put(request, "weights", REPLY)


def found(record, request=REQUEST, identity="weights"):
    reply = record.find(request, identity)
    return reply is not None and replace(reply, digest="") == REPLY


def test_replies_come_back_as_they_were(tmp_path):
    with Journal(tmp_path) as record:
        assert put(record).digest == REQUEST.digest("weights")
    with Journal(tmp_path) as record:
        assert found(record) and not found(record, OTHER) and not found(record, identity="others")
        assert (record.replayed, record.paid) == (1, 0)


def test_the_record_tells_what_was_asked_and_shared_beginnings_once(tmp_path):
    sampled = Request("a/round3", CHAT, 3, sampling=Sampling(9, 0.5, 0.9, 7, False))
    with Journal(tmp_path) as record:
        digests = [put(record, request).digest for request in (REQUEST, OTHER, sampled)]
        result = record.result("sandbox", "print(1)", lambda: {"output": "1\n"})
    compressed = tmp_path / journal.PACKED
    compressed.write_bytes(lzma.compress(record.path.read_bytes()))
    for path in (record.path, compressed):
        read = journal.read_record(path)
        assert [read.request(digest) for digest in digests] == [REQUEST, OTHER, sampled]
        assert len(read.messages) == 3 and list(read.results.values()) == [result]
    with Journal(tmp_path) as record:
        assert record.result("sandbox", "print(1)", pytest.fail) == result
        assert record.result("sandbox, 9 s", "print(1)", lambda: {"output": "2"}) == {"output": "2"}


def test_a_packed_journal_is_read_as_it_was(tmp_path):
    with Journal(tmp_path) as record:
        digests = [put(record, request).digest for request in (REQUEST, OTHER)]
        other = record.put(OTHER, "other weights", REPLY).digest
        record.result("sandbox", "print(1)", lambda: {"output": "1\n"})
    with record.path.open("a") as file:
        file.write(json.dumps({"digest": "d", "key": "k", "text": "x"}) + "\n")  # of a run before requests were kept
    packed = tmp_path / "published" / journal.PACKED
    packed.parent.mkdir()
    packed.write_bytes(pack(record.path, "weights"))
    assert journal.read_record(packed) == journal.read_record(record.path)
    text = lzma.decompress(packed.read_bytes())
    # What follows from the rest isn't there; what doesn't is.
    assert not any(digest.encode() in text for digest in digests) and other.encode() in text


def test_a_packed_journal_whose_request_was_changed_has_no_such_reply(tmp_path):
    with Journal(tmp_path) as record:
        digest = put(record).digest
    packed = tmp_path / journal.PACKED
    content = lzma.decompress(pack(record.path, "weights"))
    for old, new in ((b"weights", b"heights"), (b'"user"', b'"system"'), (b'"seed": 1', b'"seed": 2')):
        assert old in content
        packed.write_bytes(lzma.compress(content.replace(old, new)))
        assert list(journal.read_record(packed).replies) not in ([], [digest])


@pytest.mark.parametrize(
    "line",
    [b'{"role": "user", "content": "?", "before": 1}', b'{"role": "user", "content": "?", "before": -1}',
     b'{"key": "k", "seed": 1, "chat": 0, "text": ""}'],
)  # fmt: skip
def test_a_packed_line_that_points_nowhere_is_named(tmp_path, line):
    packed = tmp_path / journal.PACKED
    packed.write_bytes(lzma.compress(b"\n" + line + b"\n"))
    with pytest.raises(ValueError, match="replies.jsonl.xz, line 2"):
        journal.read_record(packed)


def test_replies_recorded_without_their_requests_are_read(tmp_path):
    line = {"digest": "d", "key": "k", "text": "x", "prompt_tokens": 1, "logprobs": None}
    (tmp_path / "replies.jsonl").write_text(json.dumps(line) + "\n")
    record = journal.read_record(tmp_path / "replies.jsonl")
    assert record.replies["d"].text == "x"
    with pytest.raises(ValueError, match="recorded without its request"):
        record.request("d")


@pytest.mark.parametrize("cut", [1, 20, 60, 150])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, cut):
    with Journal(tmp_path) as record:
        put(record)
        size = record.path.stat().st_size
        put(record, OTHER)
    with record.path.open("r+b") as file:
        file.truncate(size + cut)
    with Journal(tmp_path) as record:
        assert found(record) and not found(record, OTHER)
        digest = put(record, OTHER).digest
    with Journal(tmp_path) as record:
        assert found(record, OTHER) and record.record.request(digest) == OTHER


@pytest.mark.parametrize("line", ["not json", "[]", "{}", '{"digest": "d", "key": "k", "txt": ""}'])
def test_a_damaged_line_is_named(tmp_path, line):
    with Journal(tmp_path) as record:
        put(record)
    with record.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"replies.jsonl, line 4"):
        Journal(tmp_path)


def test_two_runs_cannot_share_a_folder(tmp_path):
    with Journal(tmp_path), pytest.raises(RuntimeError, match="in use by another run"):
        Journal(tmp_path)


def test_a_full_disk_keeps_what_was_written(tmp_path):
    """A real limit on the file's size, in a process of its own, stands for the full disk."""
    code = f"""
import resource, signal
from atp_utils.evolution.journal import Journal
from atp_utils.evolution.requests import Reply, Request
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
record = Journal({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for number in range(100):
    record.put(Request("k", [], number), "weights", Reply("x" * 300))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "replies.jsonl: File too large; the replies before are kept" in done.stderr
    with Journal(tmp_path) as record:
        kept = [number for number in range(100) if record.find(Request("k", [], number), "weights")]
    assert kept == list(range(len(kept))) and len(kept) == 3
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_the_manifest_is_last_and_says_what_was_counted(tmp_path, monkeypatch):
    frame = to_frame([], model="m", arm="base")
    with Journal(tmp_path) as record:
        put(record)
        with monkeypatch.context() as patch:
            patch.setattr(
                journal.files, "write_parquet", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
            )
            with pytest.raises(OSError, match="No space"):
                record.finish(frame, {"rounds": 2}, "weights")
        assert not (tmp_path / "manifest.json").exists()
        record.finish(frame, {"rounds": 2}, "weights")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {
        "decisions": 0, "valid": 0, "invalid": 0, "retried": 0, "cut": 0, "faults": {}, "replies_used": 1,
        "distinct_chats": 0, "replayed": 0, "answered_now": 1,
    }  # fmt: skip
    assert manifest["settings"] == {"rounds": 2} and manifest["packages"]["torch"]


def test_only_complete_runs_are_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete run"):
        journal.read_decisions(tmp_path)
    for name in ("a", "b"):
        with Journal(tmp_path / name) as record:
            record.finish(to_frame([], model=name, arm="base"), {}, "weights")
    (tmp_path / "b" / "manifest.json").unlink()
    assert isinstance(journal.read_decisions(tmp_path), pd.DataFrame)


def test_a_run_that_is_there_twice_is_refused(tmp_path):
    row = Decision(
        scenario="role_play", seed=0, item="i", environment="e", agent=0, round=1, choice=None, deviated=None,
        valid=False, attempts=1, reward=None, capital=0.0, prompt_tokens=0, completion_tokens=0, reply="", replies="",
    )  # fmt: skip
    for name, given in (("a", {}), ("b", {"training_seed": 1}), ("c", {})):
        with Journal(tmp_path / name) as record:
            record.finish(to_frame([row], model="m", arm="dpo", **given), {}, "weights")
        if name != "c":
            assert len(journal.read_decisions(tmp_path)) == 1 + (name == "b")
    with pytest.raises(ValueError, match="a and c hold the same run"):
        journal.read_decisions(tmp_path)


@pytest.mark.parametrize("lost", ["write_parquet", "write_json"])
def test_a_manifest_never_vouches_for_other_decisions(tmp_path, monkeypatch, lost):
    """A run that is finished again, with other replies, is stopped while it writes."""
    frame = to_frame([], model="m", arm="base")
    with Journal(tmp_path) as record:
        record.finish(frame, {}, "weights")
    with Journal(tmp_path) as record, monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.files, lost, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        record.finish(frame, {}, "weights")
    assert not (tmp_path / "manifest.json").exists() and not journal.complete_runs(tmp_path)
