import json
import resource
import subprocess
import sys

import pandas as pd
import pytest

from atp_utils import journal
from atp_utils.decisions import to_frame
from atp_utils.engine import Reply, Request
from atp_utils.journal import Journal

REQUEST = Request("a/round1", [{"role": "user", "content": "?"}], 1)
REPLY = Reply("ünï\ud800code\n", 3, 4, "stop", (-0.5, float("-inf")))


def test_replies_come_back_as_they_were(tmp_path):
    with Journal(tmp_path) as record:
        record.put("d1", REQUEST, REPLY)
    with Journal(tmp_path) as record:
        assert record.get("d1") == REPLY and record.get("d2") is None
        assert (record.replayed, record.paid) == (1, 0)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, cut):
    with Journal(tmp_path) as record:
        record.put("d1", REQUEST, REPLY)
        size = record.path.stat().st_size
        record.put("d2", REQUEST, REPLY)
    with record.path.open("r+b") as file:
        file.truncate(size + cut)
    with Journal(tmp_path) as record:
        assert record.get("d1") == REPLY and record.get("d2") is None
        record.put("d2", REQUEST, REPLY)
    with Journal(tmp_path) as record:
        assert record.get("d2") == REPLY


@pytest.mark.parametrize("line", ["not json", "[]", "{}", '{"digest": "d", "key": "k", "txt": ""}'])
def test_a_damaged_line_is_named(tmp_path, line):
    with Journal(tmp_path) as record:
        record.put("d1", REQUEST, REPLY)
    with record.path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"replies.jsonl, line 2"):
        Journal(tmp_path)


def test_two_runs_cannot_share_a_folder(tmp_path):
    with Journal(tmp_path), pytest.raises(RuntimeError, match="in use by another run"):
        Journal(tmp_path)


def test_a_full_disk_keeps_what_was_written(tmp_path):
    """A real limit on the file's size, in a process of its own, stands for the full disk."""
    code = f"""
import resource, signal
from atp_utils.engine import Reply, Request
from atp_utils.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
record = Journal({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
for number in range(100):
    record.put(f"d{{number}}", Request("k", [], 0), Reply("x" * 300))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "replies.jsonl: File too large; the replies before are kept" in done.stderr
    with Journal(tmp_path) as record:
        kept = [number for number in range(100) if record.get(f"d{number}")]
    assert kept == list(range(len(kept))) and len(kept) == 2000 // len(record.path.read_bytes().splitlines(True)[0])
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_the_manifest_is_last_and_says_what_was_counted(tmp_path, monkeypatch):
    frame = to_frame([], model="m", arm="base")
    with Journal(tmp_path) as record:
        record.put("d1", REQUEST, REPLY)
        with monkeypatch.context() as patch:
            patch.setattr(journal, "write_frame", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
            with pytest.raises(OSError, match="No space"):
                record.finish(frame, {"rounds": 2}, "weights")
        assert not (tmp_path / "manifest.json").exists()
        record.finish(frame, {"rounds": 2}, "weights")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["counts"] == {
        "decisions": 0, "invalid": 0, "faults": {}, "replies_used": 1, "distinct_chats": 0, "replayed": 0,
        "answered_now": 1,
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
