import pandas as pd
import pytest

from atp_utils import ROOT, journal, report, resolve
from atp_utils.decisions import to_frame

RESULTS = resolve("data/results/laptop")


def test_the_readme_shows_the_recorded_run():
    text = (ROOT / "README.md").read_text()
    for name, table in report.readme_tables(journal.read_decisions(RESULTS / "evolution")).items():
        assert table in text, name


def test_recorded_decisions_have_their_raw_replies():
    for manifest in (RESULTS / "evolution").rglob("manifest.json"):
        replies = journal.read_replies(manifest.parent / "replies.jsonl.gz")
        decisions = pd.read_parquet(manifest.parent / "decisions.parquet")
        assert len(decisions) and set(decisions["reply"]) <= set(replies)


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete run"):
        report.report(tmp_path)


def test_publishing_takes_complete_runs_and_no_weights(tmp_path):
    run, target = tmp_path / "run", tmp_path / "record"
    with journal.Journal(run / "evolution/role_play/m/base") as record:
        record.finish(to_frame([], model="m", arm="base"))
    (run / "evolution/role_play/m/dpo").mkdir()
    adapter = run / "adapters/role_play/m/dpo"
    adapter.mkdir(parents=True)
    for name in ("training_log.csv", "manifest.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    report.publish(run, target)
    published = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    assert published == [
        "adapters/role_play/m/dpo/manifest.json",
        "adapters/role_play/m/dpo/training_log.csv",
        "evolution/role_play/m/base/decisions.parquet",
        "evolution/role_play/m/base/manifest.json",
        "evolution/role_play/m/base/replies.jsonl.gz",
    ]
